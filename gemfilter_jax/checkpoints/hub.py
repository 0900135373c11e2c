"""Models from the Hugging Face hub, through its own cache."""

import pathlib

import huggingface_hub

from gemfilter_jax.errors import UserError, reason

_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]
_NOT_NEEDED = ["original/*", "onnx/*"]


def cached_or_downloaded(repository: str) -> pathlib.Path:
    """The folder of a hub repository: from the cache if complete there, else downloaded.

    Raises:
      UserError: it is in neither place; the message gives the hub's reason.
    """
    try:
        folder = huggingface_hub.snapshot_download(repository, allow_patterns=_FILES, ignore_patterns=_NOT_NEEDED)
        return pathlib.Path(folder)
    except Exception as error:  # the hub client raises its own, its HTTP library's and the operating system's errors
        raise UserError(
            f"model {repository!r}: no such folder here, and not to be had from the hub ({reason(error)})"
        ) from error
