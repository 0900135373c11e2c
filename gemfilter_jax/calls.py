"""The compiled programs that a run calls, recorded for those who count what they compute."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Call:
    """A jitted function and its arguments, the model first. Of donated arrays only shapes and dtypes can be read."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


_recording: contextvars.ContextVar[list[Call] | None] = contextvars.ContextVar("recording", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """The programs that `call` calls within the block, in order."""
    made: list[Call] = []
    token = _recording.set(made)
    try:
        yield made
    finally:
        _recording.reset(token)


def call(function: Callable[_Arguments, _Result], *arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
    """function(*arguments, **options), noted where a caller has asked for it by `recorded`."""
    if (made := _recording.get()) is not None:
        made.append(Call(function, arguments, options))
    return function(*arguments, **options)
