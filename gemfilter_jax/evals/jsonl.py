"""Reading of files with one JSON object a line, each error with its place."""

import dataclasses
import json
import pathlib
import reprlib
from collections.abc import Mapping
from typing import Any

from gemfilter_jax import files
from gemfilter_jax.errors import UserError, check_text


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a JSONL file.

    Attributes:
      place: the file and the line's number, for error messages.
      fields: the fields of its JSON object.
    """

    place: str
    fields: Mapping[str, Any]

    def text(self, name: str) -> str:
        """A field that is a string with more than white space.

        Raises:
          UserError: the field is missing or something else.
        """
        return self._checked(f"field {name!r}", self._field(name, "a string"))

    def texts(self, name: str) -> tuple[str, ...]:
        """A field that is a list of such strings, at least one.

        Raises:
          UserError: the field is missing or something else.
        """
        values = self._field(name, "a list of strings")
        if not isinstance(values, list) or not values:
            raise UserError(f"{self.place}: field {name!r} is {reprlib.repr(values)}, expected a list of strings")
        return tuple(self._checked(f"item {number} of {name!r}", value) for number, value in enumerate(values, 1))

    def _field(self, name: str, what: str) -> Any:
        if name not in self.fields:
            found = ", ".join(map(repr, self.fields)) or "none"
            raise UserError(f"{self.place}: field {name!r} is missing, expected {what}; the fields are {found}")
        return self.fields[name]

    def _checked(self, what: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{self.place}: {what} is {reprlib.repr(value)}, expected a string that is not empty")
        return check_text(value, f"{self.place}: {what}")


def read(path: str, what: str) -> list[Line]:
    """The lines of a file that are not blank, at least one; `what` says what a line holds, for error messages.

    Raises:
      UserError: the file cannot be read or has no such line, or a line is not a JSON object.
    """
    lines = []
    for number, text in enumerate(files.read_text(pathlib.Path(path), path).removeprefix("\ufeff").split("\n"), 1):
        place = f"{path}, line {number}"
        if not text.strip():
            continue
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: is not JSON ({error}), expected {what} as a JSON object") from error
        if not isinstance(fields, dict):
            raise UserError(f"{place}: is {reprlib.repr(fields)}, expected {what} as a JSON object")
        lines.append(Line(place, fields))
    if not lines:
        raise UserError(f"{path}: is empty, expected {what} as a JSON object on each line")
    return lines
