"""Keys and values that are kept, and the positions that they stand at."""

import dataclasses

import jax
import jax.numpy as jnp

from gemfilter_jax.config import ModelConfig
from gemfilter_jax.parallel import collectives

_EMPTY = -1  # the position of a slot that holds nothing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of some layers.

    Attributes:
      keys, values: [L, B, C, G, E], C slots in a row. A cache for the filter has one layer of keys more than of values.
      positions: int32 [B, C], the position of the token in each slot, -1 where there is none; [L, B, G, C] where layers
        and key heads hold different tokens.
      lengths: int32 [B], slots in use of each row; a row's next token goes behind them.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    lengths: jax.Array

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: jax.typing.DTypeLike,
        *,
        layers: int | None = None,
        key_layers: int | None = None,
    ) -> "KVCache":
        """A cache without tokens, of this device's part of the key heads.

        Args:
          batch: B. capacity: C.
          layers: of values, and of keys if `key_layers` is None; None for all of the model's.
        """
        layers = config.layers if layers is None else layers
        shape = (batch, capacity, max(config.kv_heads // collectives.axis_size("model"), 1), config.head_width)
        return cls(
            keys=jnp.zeros((layers if key_layers is None else key_layers, *shape), dtype),
            values=jnp.zeros((layers, *shape), dtype),
            positions=jnp.full((batch, capacity), _EMPTY, jnp.int32),
            lengths=jnp.zeros((batch,), jnp.int32),
        )

    def write(self, layer: jax.typing.ArrayLike, k: jax.Array, v: jax.Array) -> "KVCache":
        """Put k, v [B, K, G, E] into the first slots of every row of one layer; see `holding`."""
        start = (layer, 0, 0, 0, 0)
        return dataclasses.replace(
            self,
            keys=jax.lax.dynamic_update_slice(self.keys, k[None], start),
            values=jax.lax.dynamic_update_slice(self.values, v[None], start),
        )

    def holding(self, positions: jax.Array, lengths: jax.Array) -> "KVCache":
        """The cache whose first slots hold tokens at int positions [B, K]; the first `lengths` [B] of them are real."""
        slots = jnp.arange(positions.shape[1])
        real = jnp.where(slots < lengths[:, None], positions, _EMPTY).astype(jnp.int32)
        missing = self.positions.shape[1] - positions.shape[1]
        return dataclasses.replace(
            self,
            positions=jnp.pad(real, ((0, 0), (0, missing)), constant_values=_EMPTY),
            lengths=lengths.astype(jnp.int32),
        )

    def expecting(self, positions: jax.Array) -> "KVCache":
        """The cache whose next slots stand for tokens at int positions [B]; see `append`."""
        slot = jnp.arange(self.positions.shape[-1]) == self.lengths[:, None]
        slot, at = (slot, positions[:, None]) if self.positions.ndim == 2 else (slot[:, None], positions[:, None, None])
        return dataclasses.replace(self, positions=jnp.where(slot, at.astype(jnp.int32), self.positions))

    def append(self, layer: jax.typing.ArrayLike, k: jax.Array, v: jax.Array) -> "KVCache":
        """Put k, v [B, 1, G, E] into the next slot of every row of one layer; `lengths` stays."""
        rows = jnp.arange(k.shape[0])
        return dataclasses.replace(
            self,
            keys=self.keys.at[layer, rows, self.lengths].set(k[:, 0]),
            values=self.values.at[layer, rows, self.lengths].set(v[:, 0]),
        )

    def advanced_to(self, lengths: jax.Array) -> "KVCache":
        """The cache with `lengths` [B] slots in use, once every layer has been written."""
        return dataclasses.replace(self, lengths=lengths)

    def layer(self, layer: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Keys and values [B, C, G, E] of one layer, and the positions [B, C] or [B, G, C] of its slots."""
        positions = self.positions if self.positions.ndim == 2 else self.positions[layer]
        return self.keys[layer], self.values[layer], positions

    def next_positions(self, count: int) -> jax.Array:
        """int [B, count], the positions of tokens that follow a text whose positions have no gaps."""
        return self.lengths[:, None] + jnp.arange(count)

    def followed_by(self, held: jax.Array, new: jax.Array) -> jax.Array:
        """A layer's keys or values [B, C, G, E] with new ones [B, T, G, E] behind each row's own: [B, C + T, G, E]."""
        room = jnp.pad(held, ((0, 0), (0, new.shape[1]), (0, 0), (0, 0)))
        return room.at[jnp.arange(len(new))[:, None], self.next_positions(new.shape[1])].set(new)
