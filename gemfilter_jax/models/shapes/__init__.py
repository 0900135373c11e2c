"""Published config.json files by the name of the model: shapes without weights."""

import importlib.resources
import pathlib

_FOLDER = pathlib.Path(str(importlib.resources.files(__name__)))


def names() -> list[str]:
    """Models whose config is built in."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def config_file(name: str) -> pathlib.Path:
    """The config.json of one of `names`."""
    return _FOLDER / f"{name}.json"
