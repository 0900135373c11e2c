"""The exception for wrong input, with a one-line message that says how to correct it, and text as people may see it."""

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class UserError(ValueError):
    """A mistake in the user's input.

    The message is one line that names the mistake, the value found and the value expected. Commands print it without a
    traceback and exit with status 2. Unprintable characters, such as in names read from a file, are escaped.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """One line: unprintable characters, such as line feeds and control characters, are escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def visible(text: str) -> str:
    """A text whose control characters, line feeds and tabs aside, are escaped, so that a terminal shows them."""
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text.replace("\r\n", "\n"))


def check_text(text: object, name: str) -> str:
    """A text as it is; raises a `UserError`, which calls it `name`, if it is none, or has half of a surrogate pair."""
    if not isinstance(text, str):
        raise UserError(f"{name} is of type {type(text).__name__}, expected a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{name} has half of a surrogate pair at character {error.start}, expected UTF-8") from error
    return text


def reason(error: BaseException) -> str:
    """The first line of an exception's message, or the exception itself where it has none."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def is_fault(error: BaseException) -> bool:
    """Whether a library has failed, a panic of a Rust library included, rather than the process being ended."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception, Python's or XLA's, tells that memory is too small."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
