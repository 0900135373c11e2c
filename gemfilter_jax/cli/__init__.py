"""Command lines: one absl main a command, and `gemfilter`, which finds them."""
