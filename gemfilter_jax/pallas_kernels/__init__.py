"""Pallas kernels behind the package's doors; they raise NotImplementedError, with the reason, for what they lack."""
