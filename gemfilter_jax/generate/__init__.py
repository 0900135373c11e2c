"""From a prompt to new tokens."""
