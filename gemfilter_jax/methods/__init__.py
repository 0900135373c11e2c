"""What to keep of a prompt."""
