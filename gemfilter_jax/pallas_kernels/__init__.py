"""Pallas kernels; they raise NotImplementedError, with the reason, for inputs that they do not support."""
