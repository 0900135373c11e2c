"""GemFilter (arXiv 2409.17422)."""
