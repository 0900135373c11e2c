"""Keys and values that are kept: of a document for the filter, and stage 2's cache, which grows by a token a step."""

import dataclasses

import jax
import jax.numpy as jnp

from gemfilter_jax.config import ModelConfig
from gemfilter_jax.parallel import collectives


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer.

    Attributes:
      k, v: [L, B, C, G, E], C the capacity in tokens.
      lengths: int32 [B], filled tokens of each row; a row's next token goes there.
    """

    k: jax.Array
    v: jax.Array
    lengths: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, capacity: int, dtype: jax.typing.DTypeLike) -> "KVCache":
        """A cache of `capacity` tokens for each of `batch` rows, of this part of the model's key heads."""
        heads = max(config.kv_heads // collectives.axis_size("model"), 1)
        shape = (config.layers, batch, capacity, heads, config.head_width)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch,), jnp.int32))

    def write_prompt(self, layer: jax.typing.ArrayLike, k: jax.Array, v: jax.Array) -> "KVCache":
        """Put k, v [B, K, G, E] at the start of every row of one layer."""
        start = (layer, 0, 0, 0, 0)
        return dataclasses.replace(
            self,
            k=jax.lax.dynamic_update_slice(self.k, k[None], start),
            v=jax.lax.dynamic_update_slice(self.v, v[None], start),
        )

    def append(self, layer: jax.typing.ArrayLike, k: jax.Array, v: jax.Array) -> "KVCache":
        """Put k, v [B, 1, G, E] behind the filled tokens of every row of one layer; `lengths` stays."""
        rows = jnp.arange(k.shape[0])
        return dataclasses.replace(
            self,
            k=self.k.at[layer, rows, self.lengths].set(k[:, 0]),
            v=self.v.at[layer, rows, self.lengths].set(v[:, 0]),
        )

    def layer(self, layer: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, C, G, E] of one layer."""
        return self.k[layer], self.v[layer]

    def advanced_to(self, lengths: jax.Array) -> "KVCache":
        """The cache with `lengths` tokens filled in each row, once every layer has been written."""
        return dataclasses.replace(self, lengths=lengths)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FilterState:
    """Keys and values of the beginnings of B prompts, up to the layer r that filters.

    Attributes:
      keys, values: [r, B, S, G, E], of the layers before it.
      last_keys: [B, S, G, E], its own.
      lengths: int32 [B], how many of the S are real.
    """

    keys: jax.Array
    values: jax.Array
    last_keys: jax.Array
    lengths: jax.Array

    def positions(self, count: int) -> jax.Array:
        """int [B, count], of the tokens that follow."""
        return self.lengths[:, None] + jnp.arange(count)

    def followed(self, kept: jax.Array, new: jax.Array) -> jax.Array:
        """Keys or values kept [B, S, G, E] and behind each row's real ones the new [B, T, G, E]: [B, S + T, G, E]."""
        room = jnp.pad(kept, ((0, 0), (0, new.shape[1]), (0, 0), (0, 0)))
        return room.at[jnp.arange(len(new))[:, None], self.positions(new.shape[1])].set(new)
