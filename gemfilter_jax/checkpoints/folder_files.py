"""Files of model folders as untrusted input."""

import json
import pathlib
import reprlib
from typing import Any

from gemfilter_jax import files
from gemfilter_jax.errors import UserError, reason

_LARGEST_JSON = 1 << 24  # bytes; parsed values take up to 25 times as many


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      UserError: the file is missing, is no plain file, is too large, or holds anything else.
    """
    if not path.exists():
        raise UserError(f"{path.parent}: not a model folder, {path.name} is missing")
    files.check_plain(path, _LARGEST_JSON)
    try:
        fields = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({reason(error)})") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(fields).__name__}")
    return fields


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if fields.setdefault(name, value) != value:
            raise ValueError(f"field {reprlib.repr(name)} is there more than once, with other values")
    return fields
