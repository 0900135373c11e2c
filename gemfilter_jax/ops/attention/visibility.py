"""What a query sees."""

import dataclasses
import functools

import jax
import jax.core
import numpy as np


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tails"], meta_fields=["first", "band", "room"])
@dataclasses.dataclass(frozen=True)
class TriShape:
    """First tokens, a local band and dense last rows: attention that is linear in S.

    Attributes:
      tails: int [B], rows at the end of each prompt that see all keys before them.
      first: keys at the start of the prompt that every query after them sees.
      band: keys right before a query that it sees, its own included.
      room: no tail has more rows than this.
    """

    tails: jax.Array
    first: int
    band: int
    room: int


def refuse_positions(positions: jax.Array | None, window: jax.typing.ArrayLike | None) -> None:
    """Refuse what only a mask by positions can serve.

    Raises:
      NotImplementedError: positions are given together with a window.
    """
    if positions is not None and window is not None:
        raise NotImplementedError("masks a sliding window by slots, and positions are given")


def static_window(window: jax.typing.ArrayLike | None, length: int) -> int:
    """How many keys a query sees of a prompt of `length`, as a number that a kernel can be compiled for.

    Raises:
      NotImplementedError: the window is traced.
    """
    if isinstance(window, jax.core.Tracer):
        raise NotImplementedError("is compiled for one window, and this one is traced")
    return length if window is None else min(int(np.asarray(window)), length)
