"""Prompts sharded over the mesh's seq axis: which positions each shard holds, and rows that every device needs.

Under dense attention later rows cost more. Each shard therefore has two pieces: one from the front of the sequence and
its mirror image from the back. Under tri_shape every row costs the same. Each shard is then one piece, and its
neighbouring pieces are on the neighbouring devices.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from gemfilter_jax.parallel import collectives

_BLOCK, _STEP = 512, 128  # rows: largest block; a piece longer than it is a multiple of _STEP


@dataclasses.dataclass(frozen=True)
class SequenceShards:
    """How sequences are sharded.

    Attributes:
      axis_size: size of the seq axis, which is the number of shards.
      mirrored: whether a shard has two pieces; see the module docstring.
    """

    axis_size: int
    mirrored: bool

    @property
    def pieces(self) -> int:
        """The number of pieces in each shard."""
        return 2 if self.mirrored else 1

    def padded(self, length: int) -> int:
        """The padded length of a sequence, which makes all pieces equally long."""
        unit = self.axis_size * self.pieces
        unit *= _STEP if length > unit * _BLOCK else 1
        return -(-length // unit) * unit if self.axis_size > 1 else length

    def block(self, length: int) -> int:
        """The largest block size that divides each piece of a shard with `length` positions."""
        size = length // self.pieces
        return size if size <= _BLOCK else math.gcd(size, _BLOCK)

    def order(self, length: int) -> np.ndarray:
        """The positions 0 to length - 1 in shard order; `length` must be a padded length."""
        shard = np.arange(self.axis_size)
        pieces = np.arange(length).reshape(self.axis_size * self.pieces, -1)
        if self.mirrored:
            pieces = pieces[np.stack([shard, 2 * self.axis_size - 1 - shard], axis=1)]
        return pieces.reshape(-1)

    def starts(self, length: int, shard: jax.typing.ArrayLike | None = None) -> jax.Array:
        """int [pieces], the first position of each piece of a shard with `length` positions; None for this device's."""
        shard = collectives.axis_index("seq") if shard is None else shard
        size = length // self.pieces
        first = jnp.asarray(shard, jnp.int32) * size
        return jnp.stack([first, (2 * self.axis_size - 1) * size - first]) if self.mirrored else first[None]

    def positions(self, length: int) -> jax.Array:
        """int [length], the positions of this device's shard."""
        return (self.starts(length)[:, None] + jnp.arange(length // self.pieces)).reshape(-1)

    def rows(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rows [B, R, ...] of a sharded x [B, S, ...], on every device; zeros at positions that no shard holds.

        Args:
          positions: int [B, R].
        """
        local, mine = self.local(x.shape[1], positions)
        others = tuple(range(2, x.ndim))
        taken = jnp.take_along_axis(x, jnp.expand_dims(local, others), axis=1)
        return collectives.psum(jnp.where(jnp.expand_dims(mine, others), taken, 0), "seq")

    def local(self, length: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Indices of positions in this device's shard of `length` positions, 0 if absent, and whether it has them."""
        size = length // self.pieces
        within = positions[..., None] - self.starts(length)
        mine = (within >= 0) & (within < size)
        return (jnp.where(mine, within + jnp.arange(self.pieces) * size, 0)).sum(axis=-1), mine.any(axis=-1)


def sequence_shards(mirrored: bool) -> SequenceShards:
    """How the traced program shards sequences; `mirrored` applies only if it shards them."""
    axis_size = collectives.axis_size("seq")
    return SequenceShards(axis_size, mirrored and axis_size > 1)
