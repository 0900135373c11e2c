"""A prompt that is cut over the mesh's seq axis: which positions this device has, and rows that all need.

Attention to everything before is the more work the later a row stands, so that under dense attention a device has two
pieces, one from the front and its mirror image from the back; tri_shape costs every row the same, and a device has one
piece, whose neighbours are the neighbouring devices'.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from gemfilter_jax.parallel import collectives

_BLOCK, _STEP = 512, 128  # rows that pieces are read by: at most, and what those of longer pieces are multiples of


@dataclasses.dataclass(frozen=True)
class Cut:
    """How sequences are cut.

    Attributes:
      parts: over so many devices.
      mirrored: each device has two pieces, see the module.
    """

    parts: int
    mirrored: bool

    @property
    def pieces(self) -> int:
        """On one device."""
        return 2 if self.mirrored else 1

    def padded(self, length: int) -> int:
        """What a sequence of so many positions is padded to, so that its pieces are alike."""
        unit = self.parts * self.pieces
        unit *= _STEP if length > unit * _BLOCK else 1
        return -(-length // unit) * unit if self.parts > 1 else length

    def block(self, length: int) -> int:
        """So many rows at a time, of which each piece of a part with so many positions is a multiple."""
        size = length // self.pieces
        return size if size <= _BLOCK else math.gcd(size, _BLOCK)

    def order(self, length: int) -> np.ndarray:
        """The positions in the order in which devices have them; `length` is a multiple of all pieces."""
        pieces = np.arange(length).reshape(self.parts * self.pieces, -1)
        if self.mirrored:
            pieces = pieces[np.stack([np.arange(self.parts), 2 * self.parts - 1 - np.arange(self.parts)], axis=1)]
        return pieces.reshape(-1)

    def starts(self, length: int, part: jax.typing.ArrayLike | None = None) -> jax.Array:
        """int [pieces], where the pieces of a part begin that has so many positions; this device's if not named."""
        part = collectives.axis_index("seq") if part is None else part
        size = length // self.pieces
        first = jnp.asarray(part, jnp.int32) * size
        return jnp.stack([first, (2 * self.parts - 1) * size - first]) if self.mirrored else first[None]

    def positions(self, length: int) -> jax.Array:
        """int [length], of this device's part."""
        return (self.starts(length)[:, None] + jnp.arange(length // self.pieces)).reshape(-1)

    def rows(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rows [B, R, ...] of x [B, S, ...], of which each device has a part, on all; zeros at positions that none has.

        Args:
          positions: int [B, R].
        """
        local, mine = self.local(x.shape[1], positions)
        tail = (1,) * (x.ndim - 2)
        taken = jnp.take_along_axis(x, local.reshape(*local.shape, *tail), axis=1)
        return collectives.psum(jnp.where(mine.reshape(*mine.shape, *tail), taken, 0), "seq")

    def local(self, length: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where positions stand in this device's part of so many, and whether they do; 0 for those that do not."""
        size = length // self.pieces
        within = positions[..., None] - self.starts(length)
        mine = (within >= 0) & (within < size)
        return (jnp.where(mine, within + jnp.arange(self.pieces) * size, 0)).sum(axis=-1), mine.any(axis=-1)


def cut(mirrored: bool) -> Cut:
    """How the program that is being traced cuts sequences; `mirrored` if it does at all."""
    parts = collectives.axis_size("seq")
    return Cut(parts, mirrored and parts > 1)
