"""What a mistake looks like in the library: one printable line, or no mistake."""

from collections.abc import Callable

from gemfilter_jax.errors import UserError


def refusal(function: Callable, *args, **options) -> str | None:
    """The line that a call was refused with; None if it was not. Any other exception is raised."""
    message = None
    try:
        function(*args, **options)
    except UserError as error:
        message = str(error)
    assert message is None or (message.isprintable() and len(message) < 20_000)
    return message
