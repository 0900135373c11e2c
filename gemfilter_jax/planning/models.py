"""The config of a model whose weights are not read."""

import importlib.resources
import pathlib

from gemfilter_jax import checkpoints
from gemfilter_jax.checkpoints import embedded, hf_folder
from gemfilter_jax.config import ModelConfig
from gemfilter_jax.errors import UserError

_PUBLISHED = pathlib.Path(str(importlib.resources.files("gemfilter_jax.planning.model_configs")))


def published() -> list[str]:
    """Names of models whose config is built in."""
    return sorted(path.stem for path in _PUBLISHED.glob("*.json"))


def config_of(source: str) -> ModelConfig:
    """The config of a published model, of a config.json, or of a model folder or file.

    Raises:
      UserError: it is none of these, or not understood.
    """
    path = pathlib.Path(source).expanduser()
    if source in published():
        return hf_folder.read_config(_PUBLISHED / f"{source}.json")
    if (path / "config.json").is_file():
        return hf_folder.read_config(path / "config.json")
    if path.suffix == ".json":
        return hf_folder.read_config(path)
    if path.exists() or source == embedded.NAME:
        return checkpoints.open_checkpoint(source).config
    raise UserError(f"model {source!r} is not a folder, a file or one of {', '.join([*published(), embedded.NAME])}")
