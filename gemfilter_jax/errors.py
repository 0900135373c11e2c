"""The one exception that means: the input was wrong, and this line says how to mend it."""


class UserError(ValueError):
    """A mistake in what was asked for.

    The message is one line that names what was wrong, what was found and what would be right. Command lines print it
    without a traceback and exit with status 2. What cannot be printed, as in names that come from a file, is escaped.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


def reason(error: BaseException) -> str:
    """The first line of an exception's message, or the exception itself where it has none."""
    return (str(error).strip() or repr(error)).splitlines()[0]
