"""Model configs, read without weights."""

import pathlib

from gemfilter_jax import checkpoints
from gemfilter_jax.checkpoints import embedded, hf_folder
from gemfilter_jax.config import ModelConfig
from gemfilter_jax.errors import UserError
from gemfilter_jax.models import shapes


def config_of(source: str) -> ModelConfig:
    """The config of a published model, of a config.json, or of a model folder or file.

    Raises:
      UserError: the source is none of these, or its config is not supported.
    """
    path = pathlib.Path(source).expanduser()
    if source in shapes.names():
        return hf_folder.read_config(shapes.config_file(source))
    if (path / "config.json").is_file():
        return hf_folder.read_config(path / "config.json")
    if path.suffix == ".json":
        return hf_folder.read_config(path)
    if path.exists() or source == embedded.NAME:
        return checkpoints.open_checkpoint(source).config
    raise UserError(f"model {source!r} is not a folder, a file or one of {', '.join([*shapes.names(), embedded.NAME])}")
