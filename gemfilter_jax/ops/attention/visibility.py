"""Which keys a query sees: the tri_shape pattern and sliding windows."""

import dataclasses
import functools

import jax
import jax.core
import numpy as np


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["suffix_lengths"], meta_fields=["first", "band", "room"]
)
@dataclasses.dataclass(frozen=True)
class TriShape:
    """Attention to the first tokens and a local band, with dense last rows; linear in S.

    Attributes:
      suffix_lengths: int [B], number of rows at the end of each prompt that see all keys before them.
      first: number of keys at the start of the prompt that every query after them sees.
      band: number of nearest keys that a query sees, its own included.
      room: upper bound of `suffix_lengths`.
    """

    suffix_lengths: jax.Array
    first: int
    band: int
    room: int


def refuse_positions(positions: jax.Array | None, window: jax.typing.ArrayLike | None) -> None:
    """Refuse a sliding window over explicit positions.

    Raises:
      NotImplementedError: positions are given together with a window.
    """
    if positions is not None and window is not None:
        raise NotImplementedError("masks a sliding window by slots, and positions are given")


def static_window(window: jax.typing.ArrayLike | None, length: int) -> int:
    """The window as a static int that a kernel can be compiled for, at most the prompt's `length`.

    Raises:
      NotImplementedError: the window is traced.
    """
    if isinstance(window, jax.core.Tracer):
        raise NotImplementedError("is compiled for one window, and this one is traced")
    return length if window is None else min(int(np.asarray(window)), length)
