"""Options: dataclass fields that a user sets. One declaration gives the flag, the JSON field and the value checks."""

import dataclasses
import functools
import math
import numbers
import os
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from gemfilter_jax.errors import UserError

_OPTION = "option"
LARGEST_COUNT = 2**31 - 1  # programs index with int32


@dataclasses.dataclass(frozen=True)
class Option:
    """A field that a user sets.

    Attributes:
      kind: int, float, str or bool; the type of each item if `several`.
      at_least, at_most: inclusive bounds of a number, None if unbounded. above: exclusive lower bound, likewise.
      choices: allowed strings; empty if any string is allowed.
      several: whether the value is a tuple of items.
      optional: whether the value may be None.
      stored: whether the JSON form contains the option.
    """

    name: str
    kind: type
    default: Any
    help: str
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    several: bool = False
    optional: bool = False
    stored: bool = True

    @property
    def range(self) -> str:
        """The bounds in words, empty if there are none."""
        if self.above is not None:
            return f"above {self.above}" + ("" if self.at_most is None else f" and at most {self.at_most}")
        if self.at_least is None and self.at_most is None:
            return ""
        if self.at_most is None:
            return f"of at least {self.at_least}"
        return f"of at most {self.at_most}" if self.at_least is None else f"in [{self.at_least}, {self.at_most}]"

    def fault(self, value: Any) -> str | None:
        """The error in a value, as the end of a sentence that names the value; None if the value is valid."""
        if value is None and self.optional:
            return None
        if self.several:
            what = {int: "whole numbers", float: "numbers"}.get(self.kind, "strings")
            if not isinstance(value, tuple):
                return f"expected a list of {what}"
            faults = [self._fault_of_item(item) for item in value]
            return next((f"expected a list of {what} {self.range}".rstrip() for fault in faults if fault), None)
        return self._fault_of_item(value)

    def _fault_of_item(self, value: Any) -> str | None:
        if self.kind is bool:
            return None if isinstance(value, bool) else "expected true or false"
        if self.kind is str:
            if self.choices:
                return None if value in self.choices else f"one of {', '.join(self.choices)}"
            return None if isinstance(value, str | os.PathLike) else "expected a string"
        return self._fault_of_number(value)

    def _fault_of_number(self, value: Any) -> str | None:
        whole = self.kind is int
        of_kind = isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)
        number = _as_float(value) if of_kind else math.nan
        if math.isnan(number) or (math.isinf(number) and not whole):
            return f"expected {'a whole number' if whole else 'a number'} {self.range}".rstrip()
        if (
            (self.at_least is not None and number < self.at_least)
            or (self.at_most is not None and number > self.at_most)
            or (self.above is not None and number <= self.above)
        ):
            return f"expected a number {self.range}"
        counts = whole and self.at_least is not None
        return f"expected at most {LARGEST_COUNT:,}" if counts and number > LARGEST_COUNT else None

    def check(self, value: Any, shown: str) -> None:
        """Raise a `UserError` that begins with `shown` if the value is invalid."""
        if fault := self.fault(value):
            raise UserError(f"{shown}{fault}")


def _as_float(value: Any) -> float:
    """A number as a float, infinite beyond their range."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    stored: bool = True,
) -> Any:
    """A dataclass field that is an option; its annotation is the option's kind. See `Option`."""
    metadata = {"help": help, "at_least": at_least, "at_most": at_most, "above": above, "stored": stored}
    return dataclasses.field(default=default, metadata={_OPTION: metadata})


def option_of(owner: type, name: str, **changes: Any) -> Any:
    """A dataclass field that is the option of this name of another dataclass, its default included unless changed."""
    field = next(field for field in dataclasses.fields(owner) if field.name == name)
    return dataclasses.field(**{"default": field.default, "metadata": field.metadata} | changes)


@functools.cache
def options_of(owner: type) -> tuple[Option, ...]:
    """The options among a dataclass's fields, in order."""
    hints = typing.get_type_hints(owner)
    return tuple(
        Option(field.name, default=field.default, **_kind(hints[field.name]), **field.metadata[_OPTION])
        for field in dataclasses.fields(owner)
        if _OPTION in field.metadata
    )


def _kind(hint: Any) -> dict[str, Any]:
    """Fields of `Option` for an annotation such as `int`, `str | None`, `tuple[int, ...]` or `Literal["a", "b"]`."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (inner,) = (one for one in typing.get_args(hint) if one is not types.NoneType)
        return _kind(inner) | {"optional": True}
    if typing.get_origin(hint) is tuple:
        return {"kind": typing.get_args(hint)[0], "several": True}
    if typing.get_origin(hint) is Literal:
        return {"kind": str, "choices": typing.get_args(hint)}
    return {"kind": hint}


def plain(value: Any) -> Any:
    """Python's own number for one of NumPy's, a tuple for a list or an array."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(value) if isinstance(value, list) else value


def check(of: Any) -> None:
    """Raise a `UserError` if a dataclass has a value that its option does not allow."""
    for one in options_of(type(of)):
        value = getattr(of, one.name)
        one.check(value, f"{one.name} is {reprlib.repr(value)}, ")


def to_json(of: Any) -> dict[str, Any]:
    """The values of a dataclass's stored options by name, as `from_json` reads them."""
    return {one.name: getattr(of, one.name) for one in options_of(type(of)) if one.stored}


def from_json(owner: type, fields: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Values of options by name, from the fields of a JSON object; every field must be an option.

    Raises:
      UserError: a field is unknown, or its value is invalid.
    """
    own = {one.name: one for one in options_of(owner) if one.stored}
    if unknown := sorted(set(fields) - set(own)):
        raise UserError(f"{source}: unsupported field(s) {', '.join(unknown)}; one of {', '.join(own)}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    for name, value in values.items():
        own[name].check(value, f"{source}: field {name!r} is {reprlib.repr(fields[name])}, ")
    return values
