"""The KV cache: keys and values, and their positions."""

import dataclasses

import jax
import jax.numpy as jnp

from gemfilter_jax.config import ModelConfig
from gemfilter_jax.parallel import collectives, sharding

_EMPTY = -1  # the position of an empty slot


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of some layers.

    Attributes:
      keys, values: [L, B, C, G, E], C slots per row. A cache for the filter has one more layer of keys than of values.
      positions: int32 [B, C], the position of the token in each slot, -1 for an empty slot; [L, B, G, C] if layers and
        key heads hold different tokens.
      lengths: int32 [B], number of slots in use in each row; a row's next token goes into the slot after them.
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
        of_heads: bool = False,
    ) -> "KVCache":
        """An empty cache for this device's shard of the key heads.

        Args:
          batch: B. capacity: C.
          layers: number of value layers, and of key layers if `key_layers` is None; None for all of the model's layers.
          of_heads: whether layers and key heads may hold different tokens.
        """
        layers = config.layers if layers is None else layers
        key_heads = max(config.kv_heads // collectives.axis_size("model"), 1)
        shape = (batch, capacity, key_heads, config.head_width)
        slots = (layers, batch, key_heads, capacity) if of_heads else (batch, capacity)
        return cls(
            keys=jnp.zeros((layers if key_layers is None else key_layers, *shape), dtype),
            values=jnp.zeros((layers, *shape), dtype),
            positions=jnp.full(slots, _EMPTY, jnp.int32),
            lengths=jnp.zeros((batch,), jnp.int32),
        )

    @property
    def of_heads(self) -> bool:
        """Whether layers and key heads may hold different tokens."""
        return self.positions.ndim > 2

    def write(self, layer: jax.typing.ArrayLike, k: jax.Array, v: jax.Array) -> "KVCache":
        """Put k, v [B, K, G, E] into the first slots of every row of one layer; see `holding`."""
        start = (layer, 0, 0, 0, 0)
        return dataclasses.replace(
            self,
            keys=jax.lax.dynamic_update_slice(self.keys, k[None], start),
            values=jax.lax.dynamic_update_slice(self.values, v[None], start),
        )

    def write_some(
        self, layer: jax.typing.ArrayLike, k: jax.Array, v: jax.Array, chosen: jax.Array, positions: jax.Array
    ) -> "KVCache":
        """Put chosen tokens of k, v [B, S, G, E] into the first slots of every row of one layer; needs `of_heads`.

        Args:
          chosen: int [B, K] or [B, G, K], indices into S; the value S leaves a slot empty.
          positions: int [B, S], the tokens' positions.
        """
        batch, _, heads, _ = k.shape
        chosen = jnp.broadcast_to(chosen if chosen.ndim == 3 else chosen[:, None], (batch, heads, chosen.shape[-1]))
        columns = chosen.swapaxes(1, 2)[..., None]

        def taken(x: jax.Array) -> jax.Array:
            return jnp.take_along_axis(x, columns, axis=1, mode="fill", fill_value=0)

        held = jnp.take_along_axis(positions[:, None], chosen, axis=2, mode="fill", fill_value=_EMPTY)
        start = (layer, 0, 0, 0)
        written = self.write(layer, taken(k), taken(v))
        placed = jax.lax.dynamic_update_slice(self.positions, held[None].astype(jnp.int32), start)
        return dataclasses.replace(written, positions=placed)

    def holding(self, positions: jax.Array, lengths: jax.Array) -> "KVCache":
        """The cache with its first slots holding tokens at int positions [B, K], of which `lengths` [B] are real."""
        slots = jnp.arange(positions.shape[1])
        real = jnp.where(slots < lengths[:, None], positions, _EMPTY).astype(jnp.int32)
        missing = self.positions.shape[1] - positions.shape[1]
        return dataclasses.replace(
            self,
            positions=jnp.pad(real, ((0, 0), (0, missing)), constant_values=_EMPTY),
            lengths=lengths.astype(jnp.int32),
        )

    def expecting(self, positions: jax.Array) -> "KVCache":
        """The cache with each row's next slot reserved for a token at int positions [B]; see `append`."""
        slot = jnp.arange(self.positions.shape[-1]) == self.lengths[:, None]
        slot, at = (slot[:, None], positions[:, None, None]) if self.of_heads else (slot, positions[:, None])
        return dataclasses.replace(self, positions=jnp.where(slot, at.astype(jnp.int32), self.positions))

    def append(self, layer: jax.typing.ArrayLike, k: jax.Array, v: jax.Array) -> "KVCache":
        """Put k, v [B, 1, G, E] into the next slot of every row of one layer; `lengths` does not change."""
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
        positions = self.positions[layer] if self.of_heads else self.positions
        return self.keys[layer], self.values[layer], positions

    def next_positions(self, count: int) -> jax.Array:
        """int [B, count], the positions of the next tokens, if the cached positions have no gaps."""
        return self.lengths[:, None] + jnp.arange(count)

    def followed_by(self, held: jax.Array, new: jax.Array) -> jax.Array:
        """A layer's keys or values [B, C, G, E] with new ones [B, T, G, E] after each row's own: [B, C + T, G, E]."""
        room = jnp.pad(held, ((0, 0), (0, new.shape[1]), (0, 0), (0, 0)))
        return room.at[jnp.arange(len(new))[:, None], self.next_positions(new.shape[1])].set(new)


def cache_specs(*, of_heads: bool = False) -> KVCache:
    """The `PartitionSpec`s of a cache on a mesh."""
    stacked, batch = sharding.spec(None, "batch", None, "kv_heads"), sharding.spec("batch")
    positions = sharding.spec(None, "batch", "kv_heads") if of_heads else batch
    return KVCache(keys=stacked, values=stacked, positions=positions, lengths=batch)
