"""The jitted programs: filter a prompt, then generate from what was kept.

Those of a model on a mesh run on all its devices: `score_prompt` cuts prompts over the seq axis, the others have that
axis join the data axis. Batches must then be multiples of the axis that cuts them, see `sharding.evenly`.

Axes: B batch, S prompt bucket, K kept bucket, T bucket of new tokens, V vocabulary. Sizes are buckets and static;
lengths, the filter layer, keep, head weights, temperature, seeds and limits are traced.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemfilter_jax.config import LongRope
from gemfilter_jax.generate import sampling as sampling_lib
from gemfilter_jax.generate.sampling import Sampling
from gemfilter_jax.models.cache import KVCache
from gemfilter_jax.models.transformer import Decoder
from gemfilter_jax.ops.attention import TriShape
from gemfilter_jax.ops.key_scores import Normalisation, score_keys
from gemfilter_jax.parallel import collectives, sharding, shards


@functools.partial(jax.jit, static_argnames=("window", "normalisation"))
def score_prompt(
    model: Decoder,
    ids: jax.Array,
    lengths: jax.Array,
    tails: jax.Array,
    filter_layer: jax.typing.ArrayLike,
    head_weights: jax.Array,
    *,
    window: int,
    normalisation: Normalisation,
    pattern: TriShape | None = None,
) -> jax.Array:
    """Stage 1: a score for every prompt token.

    Args:
      ids: int32 [B, S]. lengths: int32 [B]. filter_layer: r. head_weights: float32 [H].
      tails: int32 [B], the last tokens of each prompt, of which at most the last `window` observe.
      window: W. normalisation: see `scoring.score_keys`.
      pattern: of attention, None for dense.

    Returns:
      float32 [B, S].
    """

    def scores(model, ids, lengths, tails, pattern, filter_layer, head_weights):
        with jax.named_scope("filter"):
            q, k, rows = model.keys_and_last_queries(ids, lengths, filter_layer, window, pattern)
            return score_keys(
                q,
                _observing(rows, tails),
                k,
                head_weights=collectives.own_shard(head_weights, "model", 0),
                normalisation=normalisation,
                cut=shards.cut(mirrored=pattern is None),
            )

    length, shape = ids.shape[1], sharding.shape_of(model.mesh)
    cut = shards.Cut(shape.seq, mirrored=pattern is None and shape.seq > 1)
    ids = jnp.pad(ids, ((0, 0), (0, cut.padded(length) - length)))
    order = cut.order(ids.shape[1])
    batch, cut_batch = sharding.spec("batch"), sharding.spec("batch", "sequence")
    run = _on_devices(model, scores, (cut_batch, batch, batch, batch, None, None), cut_batch, cuts_sequences=True)
    ordered = run(ids[:, order] if cut.mirrored else ids, lengths, tails, pattern, filter_layer, head_weights)
    return (ordered[:, np.argsort(order)] if cut.mirrored else ordered)[:, :length]


def _on_devices(
    model: Decoder,
    fn: Callable[..., Any],
    in_specs: tuple[Any, ...],
    out_specs: Any,
    *,
    cuts_sequences: bool = False,
) -> Callable[..., Any]:
    """fn(model, ...) as a function of its other arguments, run on the model's mesh if it has one.

    Args:
      in_specs, out_specs: layouts, of whole subtrees where only one is given; None for what all devices have.
    """
    if model.mesh is None:
        return functools.partial(fn, model)
    mesh = model.mesh if cuts_sequences else sharding.without_seq(model.mesh)
    return functools.partial(
        collectives.shard_map(mesh, fn, (sharding.specs(model, mesh), *in_specs), out_specs), model
    )


def _observing(rows: jax.Array, tails: jax.Array) -> jax.Array:
    """Rows [B, W] that end a prompt, those before its last `tails` [B] made -1."""
    window = rows.shape[1]
    return jnp.where(jnp.arange(window) >= window - tails[:, None], rows, -1)


@functools.partial(jax.jit, static_argnames=("layers", "window", "normalisation"))
def score_heads(
    model: Decoder,
    ids: jax.Array,
    lengths: jax.Array,
    tails: jax.Array,
    *,
    layers: int,
    window: int,
    normalisation: Normalisation,
    pattern: TriShape | None = None,
) -> jax.Array:
    """What each head of each of the first `layers` layers would score alone: float32 [layers, B, H, S]."""

    def scores(model, ids, lengths, tails, pattern):
        each = collectives.own_shard(jnp.eye(model.config.heads), "model", 1)

        def look(q: jax.Array, k: jax.Array, rows: jax.Array) -> jax.Array:
            return score_keys(q, _observing(rows, tails), k, head_weights=each, normalisation=normalisation)

        with jax.named_scope("filter"):
            return model.at_each_layer(ids, lengths, layers, window, look, pattern)

    batch = sharding.spec("batch")
    run = _on_devices(model, scores, (batch, batch, batch, batch), sharding.spec(None, "batch"))
    return run(ids, lengths, tails, pattern)


@functools.partial(jax.jit, static_argnames=("filter_layer",))
def read(
    model: Decoder,
    ids: jax.Array,
    lengths: jax.Array,
    extents: jax.Array,
    *,
    filter_layer: int,
    pattern: TriShape | None = None,
) -> KVCache:
    """Stage 1 of the beginnings of prompts, for any number of endings; see `Decoder.read` and `score_after`."""

    def state(model, ids, lengths, extents, pattern):
        with jax.named_scope("read"):
            return model.read(ids, lengths, extents, filter_layer, pattern)

    batch = sharding.spec("batch")
    run = _on_devices(model, state, (batch, batch, batch, batch), _cache_specs())
    return run(ids, lengths, extents, pattern)


def _cache_specs() -> KVCache:
    stacked, batch = sharding.spec(None, "batch", None, "kv_heads"), sharding.spec("batch")
    return KVCache(keys=stacked, values=stacked, positions=batch, lengths=batch)


@functools.partial(jax.jit, static_argnames=("window", "normalisation"))
def score_after(
    model: Decoder,
    state: KVCache,
    ids: jax.Array,
    lengths: jax.Array,
    head_weights: jax.Array,
    *,
    window: int,
    normalisation: Normalisation,
) -> jax.Array:
    """Stage 1 of prompts whose beginnings have been read.

    Args:
      ids: int32 [B, T], how the prompts go on. lengths: int32 [B]; at most the last `window` of them observe.
      head_weights, window, normalisation: see `score_prompt`.

    Returns:
      float32 [B, S + T], a score for every token of the beginnings and of what follows them.
    """

    def scores(model, state, ids, lengths, head_weights):
        with jax.named_scope("filter"):
            q, k, rows = model.keys_and_last_queries_after(state, ids, lengths, window)
            own = collectives.own_shard(head_weights, "model", 0)
            return score_keys(q, rows, k, head_weights=own, normalisation=normalisation)

    batch = sharding.spec("batch")
    run = _on_devices(model, scores, (_cache_specs(), batch, batch, None), batch)
    return run(state, ids, lengths, head_weights)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything that changes while tokens are generated.

    Attributes:
      tokens: int32 [B, T], the new tokens; a row's first `lengths` are real, an end token included.
      lengths: int32 [B], new tokens of each row.
      stopped: bool [B], rows that met an end token.
      last: int32 [B], the token to feed next. positions: int32 [B], its rotary position.
      cache: keys and values of the prompt and of all tokens fed so far.
      prompt, prompt_positions: int32 [B, K], the prompt and its rotary positions.
      keys: random keys [B], one a row, folded with the row's own count of tokens.
      limit: int32, new tokens at most, T or fewer.
      stop_tokens: int32 [N], any of which ends a row.
      sampling: how tokens are drawn.
    """

    tokens: jax.Array
    lengths: jax.Array
    stopped: jax.Array
    last: jax.Array
    positions: jax.Array
    cache: KVCache
    prompt: jax.Array
    prompt_positions: jax.Array
    keys: jax.Array
    limit: jax.Array
    stop_tokens: jax.Array
    sampling: Sampling

    @property
    def running(self) -> jax.Array:
        """bool [B], rows that want another token."""
        return ~self.stopped & (self.lengths < self.limit)


@functools.partial(jax.jit, static_argnames=("capacity", "gaps"))
def begin(
    model: Decoder,
    ids: jax.Array,
    lengths: jax.Array,
    positions: jax.Array,
    *,
    stop_tokens: jax.Array,
    sampling: Sampling,
    seeds: jax.Array,
    limit: jax.typing.ArrayLike,
    capacity: int,
    gaps: bool = False,
) -> DecodeState:
    """Stage 2, first half: run the kept prompt through all layers and draw each row's first token.

    Args:
      ids: int32 [B, K]. lengths: int32 [B]. positions: int32 [B, K], rotary positions.
      stop_tokens: int32 [N]. seeds: uint32 [B]. limit: new tokens at most, 1 or more. capacity: T, room for new tokens.
      gaps: whether positions have gaps, which sliding windows then count.
    """

    def begun(model, ids, lengths, positions, seeds, stop_tokens, sampling, limit):
        with jax.named_scope("prefill"):
            batch, kept = ids.shape
            cache = KVCache.empty(model.config, batch, kept + capacity, model.dtype)
            logits, cache = model.prefill(ids, lengths, positions, cache, gaps=gaps)
            state = DecodeState(
                tokens=jnp.zeros((batch, capacity), jnp.int32),
                lengths=jnp.zeros((batch,), jnp.int32),
                stopped=jnp.zeros((batch,), bool),
                last=jnp.zeros((batch,), jnp.int32),
                positions=jnp.take_along_axis(positions, (lengths - 1)[:, None], axis=1)[:, 0],
                cache=cache,
                prompt=ids,
                prompt_positions=positions,
                keys=jax.vmap(jax.random.key)(seeds),
                limit=limit,
                stop_tokens=stop_tokens,
                sampling=sampling,
            )
            return _take(state, logits)

    batch = sharding.spec("batch")
    run = _on_devices(model, begun, (batch, batch, batch, batch, None, None, None), _decode_state_specs())
    return run(ids, lengths, positions, seeds, stop_tokens, sampling, jnp.asarray(limit, jnp.int32))


def _decode_state_specs() -> DecodeState:
    batch = sharding.spec("batch")
    return DecodeState(
        tokens=batch,
        lengths=batch,
        stopped=batch,
        last=batch,
        positions=batch,
        cache=_cache_specs(),
        prompt=batch,
        prompt_positions=batch,
        keys=batch,
        limit=sharding.spec(),
        stop_tokens=sharding.spec(),
        sampling=sharding.spec(),
    )


def _take(state: DecodeState, logits: jax.Array) -> DecodeState:
    """Draw a token for each running row and book it."""
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.lengths)
    drawn = sampling_lib.sample(logits, state.sampling, keys)
    running = state.running
    rows = jnp.arange(len(drawn))
    column = jnp.where(running, state.lengths, state.tokens.shape[1])
    return dataclasses.replace(
        state,
        tokens=state.tokens.at[rows, column].set(drawn, mode="drop"),
        lengths=state.lengths + running,
        stopped=state.stopped | (running & jnp.isin(drawn, state.stop_tokens)),
        last=jnp.where(running, drawn, state.last),
        positions=state.positions + running,
    )


def _step(model: Decoder, state: DecodeState) -> DecodeState:
    with jax.named_scope("decode"):
        running = state.running
        logits, cache = _fed(model, state)
        cache = cache.advanced_to(jnp.where(running, cache.lengths, state.cache.lengths))
        return _take(dataclasses.replace(state, cache=cache), logits)


def _fed(model: Decoder, state: DecodeState) -> tuple[jax.Array, KVCache]:
    """Logits [B, V] after each row's last token, and the grown cache.

    A row that grows past `LongRope`'s original context is read again from its start with the other table, as Hugging
    Face's Phi-3 does.
    """
    scaling = model.config.rope_scaling

    def feed() -> tuple[jax.Array, KVCache]:
        return model.decode(state.last, state.positions, state.cache)

    def read_again() -> tuple[jax.Array, KVCache]:
        return model.prefill(*_sequence(state), state.cache)

    if not isinstance(scaling, LongRope):
        return feed()
    crossing = state.running & (state.positions == scaling.original_context)
    return jax.lax.cond(collectives.any_row(crossing), read_again, feed)


def _sequence(state: DecodeState) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Prompt and new tokens of each row in one: ids [B, K + T], lengths [B], rotary positions [B, K + T]."""
    lengths = state.cache.lengths + 1  # the last token is not in the cache yet
    new = jnp.arange(state.prompt.shape[1] + state.tokens.shape[1]) - (lengths - state.lengths)[:, None]
    columns = jnp.clip(new, 0, state.tokens.shape[1] - 1)
    tail = ((0, 0), (0, state.tokens.shape[1]))
    ids = jnp.where(new < 0, jnp.pad(state.prompt, tail), jnp.take_along_axis(state.tokens, columns, axis=1))
    first = (state.positions - state.lengths + 1)[:, None]
    positions = jnp.where(new < 0, jnp.pad(state.prompt_positions, tail), first + new)
    return ids, lengths, positions


@functools.partial(jax.jit, donate_argnames=("state",))
def step(model: Decoder, state: DecodeState) -> DecodeState:
    """One more token for each running row; what streaming drives from the host. The given state is consumed."""
    specs = _decode_state_specs()
    return _on_devices(model, _step, (specs,), specs)(state)


@functools.partial(jax.jit, donate_argnames=("state",))
def finish(model: Decoder, state: DecodeState) -> DecodeState:
    """Step until no row runs. The given state is consumed."""

    def stepped(model, state):
        step = functools.partial(_step, model)
        return jax.lax.while_loop(lambda state: collectives.any_row(state.running), step, state)

    specs = _decode_state_specs()
    return _on_devices(model, stepped, (specs,), specs)(state)
