"""The exception for wrong input, with a one-line message that says how to correct it."""


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


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception, Python's or XLA's, tells that memory is too small."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
