"""The one exception that means: the input was wrong, and this line says how to mend it."""


class UserError(ValueError):
    """A mistake in what was asked for.

    The message is one line that names what was wrong, what was found and what would be right. Command lines print it
    without a traceback and exit with status 2.
    """
