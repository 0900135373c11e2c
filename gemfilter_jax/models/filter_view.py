"""What the filter sees of a model: keys and last queries of some layers, of whole prompts or after read prefixes.

Axes as in `transformer`. Every function is one `Decoder.forward` with hooks of its own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gemfilter_jax.models.cache import KVCache
from gemfilter_jax.models.hooks import Attend, Visit
from gemfilter_jax.models.layer import Table
from gemfilter_jax.models.rope import rotary_table
from gemfilter_jax.models.transformer import Decoder, keep_all
from gemfilter_jax.ops import attention
from gemfilter_jax.ops.attention import TriShape
from gemfilter_jax.parallel import shards

Look = Callable[[jax.typing.ArrayLike, jax.Array, jax.Array, jax.Array], jax.Array]
"""Given a layer's index, and q, k and rows of `keys_and_last_queries` there."""


def keys_and_last_queries(
    model: Decoder,
    x: jax.Array,
    lengths: jax.Array,
    layer: jax.typing.ArrayLike,
    observation_window: int,
    pattern: TriShape | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the filter looks at in a layer: its keys of all positions, and its queries of the last real ones.

    Args:
      x: [B, S, D], the input of the layer. lengths: [B]. layer: 0-based index, may be traced.
      observation_window: W. pattern: the attention pattern of the layers before, None for dense.

    Returns:
      q [B, W, H, E] and k [B, S, G, E], both after rotary, and rows [B, W], the positions of q; a row before the
      start of a prompt shorter than W has a negative position and a meaningless q.
    """
    with jax.named_scope("filter_layer"):
        own = model.layer(layer)
        k = own.keys(own.attention_norm(x), model.prompt_table(x, lengths, pattern))
        rows, x_rows = _last_rows(x, lengths, observation_window, pattern)
        q = own.queries(own.attention_norm(x_rows), rotary_table(model.config, rows, lengths))
    return q, k, rows


def _last_rows(
    x: jax.Array, lengths: jax.Array, observation_window: int, pattern: TriShape | None
) -> tuple[jax.Array, jax.Array]:
    """The positions [B, W] of the last real rows of x [B, S, ...], and those rows [B, W, ...]."""
    rows = lengths[:, None] - observation_window + jnp.arange(observation_window)
    return rows, shards.sequence_shards(mirrored=pattern is None).rows(x, rows)


def looked_at(
    model: Decoder,
    ids: jax.Array,
    lengths: jax.Array,
    layers: jax.Array,
    last: jax.typing.ArrayLike,
    observation_window: int,
    look: Look,
    pattern: TriShape | None = None,
) -> jax.Array:
    """The sum of look(layer, q, k, rows) over some layers, on what `keys_and_last_queries` gives there.

    Layers 0..last-1 run in full.

    Args:
      ids: [B, S]. lengths: [B]. observation_window: W. pattern: of attention, None for dense.
      layers: int [N], the layers to look at, which may be traced; where there is one, it is `last`.
      last: the layer to stop at, which may be traced; no later layer runs.
    """

    def at(layer: jax.typing.ArrayLike, x: jax.Array) -> jax.Array:
        return look(layer, *keys_and_last_queries(model, x, lengths, layer, observation_window, pattern))

    def visited(visit: Visit) -> jax.Array:
        rows, q = _last_rows(visit.q, lengths, observation_window, pattern)
        return look(visit.layer, q, visit.k, rows)

    attend, table = model.among_themselves(lengths, pattern), model.prompt_table(ids, lengths, pattern)
    return _summed_over(model, layers, last, visited, at, ids, table, lengths, attend)


def _summed_over(
    model: Decoder,
    layers: jax.Array,
    last: jax.typing.ArrayLike,
    visited: Callable[[Visit], jax.Array],
    at: Callable[[jax.typing.ArrayLike, jax.Array], jax.Array],
    ids: jax.Array,
    table: Table,
    lengths: jax.Array,
    attend: Attend,
) -> jax.Array:
    """The sum of what some layers show, in one `forward`: visited(visit) before layer `last`, there at(layer, x).

    See `looked_at`. Layer `last` does not run: at(layer, x) is told its input x.
    """

    def add_if_looked_at(visit: Visit, total: jax.Array) -> jax.Array:
        here = (layers == visit.layer).any()
        return jax.lax.cond(here, lambda: total + visited(visit), lambda: total)

    x = model.embed(ids)
    one = jax.eval_shape(at, 0, x)
    hook = None if len(layers) == 1 else add_if_looked_at
    nothing = jnp.zeros(one.shape, one.dtype)
    x, total = model.forward(x, table, lengths, layers=last, attend=attend, hook=hook, state=nothing)
    return total + at(last, x)


def at_each_layer(
    model: Decoder,
    ids: jax.Array,
    lengths: jax.Array,
    layers: int,
    observation_window: int,
    look: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    pattern: TriShape | None = None,
) -> jax.Array:
    """look(q, k, rows) on what `keys_and_last_queries` gives at each of the first `layers` layers, stacked."""
    x = model.embed(ids)

    def view(index: jax.typing.ArrayLike, x: jax.Array) -> jax.Array:
        return look(*keys_and_last_queries(model, x, lengths, index, observation_window, pattern))

    def record(visit: Visit, recorded: jax.Array) -> jax.Array:
        return recorded.at[visit.layer].set(view(visit.layer, visit.x))

    one = jax.eval_shape(view, 0, x)
    return model.forward(
        x,
        model.prompt_table(ids, lengths, pattern),
        lengths,
        layers=layers,
        attend=model.among_themselves(lengths, pattern),
        hook=record,
        state=jnp.zeros((layers, *one.shape), one.dtype),
    )[1]


def read(
    model: Decoder, ids: jax.Array, lengths: jax.Array, extents: jax.Array, layer: int, pattern: TriShape | None = None
) -> KVCache:
    """Prefill prompt prefixes for the filter at `layer`: a cache of keys up to that layer and values before it.

    Args:
      ids: [B, S], the prefixes. lengths: [B], of the prefixes. extents: [B], lengths of the whole prompts.
      pattern: the attention pattern, None for dense.
    """
    table = model.prompt_table(ids, extents, pattern)
    batch, length = ids.shape
    cache = KVCache.empty(model.config, batch, length, model.dtype, layers=layer, key_layers=layer + 1)
    attend = model.among_themselves(lengths, pattern)
    x, cache = model.forward(model.embed(ids), table, lengths, layers=layer, attend=attend, hook=keep_all, state=cache)
    last = model.layer(layer)
    keys = cache.keys.at[layer].set(last.keys(last.attention_norm(x), table))
    positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
    return dataclasses.replace(cache, keys=keys).holding(positions, lengths)


def looked_at_after(
    model: Decoder,
    read: KVCache,
    ids: jax.Array,
    lengths: jax.Array,
    layers: jax.Array,
    observation_window: int,
    look: Look,
) -> jax.Array:
    """As `looked_at`, for prompts whose prefixes are cached by `read`, up to the layer that the cache ends at.

    Args:
      read: the cache of B prefixes. ids: [B, T], the tokens after the prefixes. lengths: [B], how many are real.
      look: is given q [B, W, H, E], k [B, S + T, G, E] and rows [B, W], -1 for rows before `ids`; each row of k
        begins with the keys of its prefix, then those of its `ids`.
    """
    observed = lengths[:, None] - observation_window + jnp.arange(observation_window)
    rows = jnp.where(observed < 0, -1, read.lengths[:, None] + observed)
    positions = read.next_positions(ids.shape[1])
    table = rotary_table(model.config, positions, read.lengths + lengths)

    def attend(visit: Visit, _: Any) -> jax.Array:
        keys, values = read.keys[visit.layer], read.values[visit.layer]
        k, v = read.followed_by(keys, visit.k), read.followed_by(values, visit.v)
        return attention.rows(visit.q, positions, k, v, window=visit.sliding_window)

    def seen(index: jax.typing.ArrayLike, q: jax.Array, k: jax.Array) -> jax.Array:
        last_q = jnp.take_along_axis(q, jnp.maximum(observed, 0)[..., None, None], axis=1)
        return look(index, last_q, read.followed_by(read.keys[index], k), rows)

    def at(index: jax.typing.ArrayLike, x: jax.Array) -> jax.Array:
        layer = model.layer(index)
        normed = layer.attention_norm(x)
        return seen(index, layer.queries(normed, table), layer.keys(normed, table))

    def visited(visit: Visit) -> jax.Array:
        return seen(visit.layer, visit.q, visit.k)

    return _summed_over(model, layers, len(read.values), visited, at, ids, table, lengths, attend)
