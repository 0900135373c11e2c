"""What a mistake looks like in the library, one printable line, and the places in JSON where there may be one."""

from collections.abc import Callable
from typing import Any

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


def places(fields: dict | list) -> list[tuple[dict | list, Any]]:
    """All (container, key) in a JSON value."""
    found = []
    for key in list(fields) if isinstance(fields, dict) else range(len(fields)):
        found.append((fields, key))
        if isinstance(fields[key], dict | list):
            found += places(fields[key])
    return found
