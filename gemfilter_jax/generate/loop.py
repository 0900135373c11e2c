"""Generation as jitted programs: a prefill of the kept tokens, then decode steps.

On a mesh, the seq axis joins the model axis, see `MeshShape.generating`. The batch size must be a multiple of the data
axis of that shape; see `sharding.evenly`.

Axes: B batch, K bucket of kept tokens, T bucket of new tokens, V vocabulary. Sizes are buckets and static; lengths,
temperature, seeds and limits are traced.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemfilter_jax.config import LongRope, ModelConfig
from gemfilter_jax.errors import UserError
from gemfilter_jax.generate import sampling as sampling_lib
from gemfilter_jax.generate.sampling import Sampling
from gemfilter_jax.models.cache import KVCache, cache_specs
from gemfilter_jax.models.hooks import Eviction
from gemfilter_jax.models.transformer import Decoder
from gemfilter_jax.parallel import collectives, sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of generation.

    Attributes:
      tokens: int32 [B, T], the new tokens; the first `lengths` of each row are real, including a stop token.
      lengths: int32 [B], number of new tokens in each row.
      stopped: bool [B], rows that drew a stop token.
      last: int32 [B], the token to feed next. positions: int32 [B], its rotary position.
      cache: keys and values of the prompt and of all tokens fed so far.
      prompt, prompt_positions: int32 [B, K], the prompt and its rotary positions.
      keys: random keys [B], one for each row, folded with the row's number of new tokens.
      limit: int32, maximum number of new tokens, at most T.
      stop_tokens: int32 [N], each of which ends a row.
      sampling: sampling settings.
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
        """bool [B], rows that need another token."""
        return ~self.stopped & (self.lengths < self.limit)


def pad(rows: Sequence[np.ndarray], width: int) -> tuple[jax.Array, jax.Array]:
    """Rows of token ids, padded on the right to int32 [B, width], and their true lengths int32 [B]."""
    padded = np.zeros((len(rows), width), np.int32)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return jnp.asarray(padded), jnp.asarray([len(row) for row in rows], jnp.int32)


def check_eviction(config: ModelConfig, lengths: Iterable[int], new_tokens: int) -> None:
    """Raise a `UserError` if prompts of these lengths grow past the point where evicted keys would be rotated anew."""
    if not isinstance(config.rope_scaling, LongRope):
        return
    limit = config.rope_scaling.original_context
    for length in lengths:
        if length <= limit < length + new_tokens:
            raise UserError(
                f"a prompt of {length} tokens and {new_tokens} new ones cross {limit} tokens, where LongRoPE rotates "
                "all keys anew, and some have been evicted; give a shorter or a longer text"
            )


@functools.partial(jax.jit, static_argnames=("capacity", "gaps", "eviction"))
def prefill(
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
    eviction: Eviction | None = None,
) -> DecodeState:
    """Run prompts through all layers and draw each row's first token.

    Args:
      ids: int32 [B, K]. lengths: int32 [B]. positions: int32 [B, K], rotary positions.
      stop_tokens: int32 [N]. seeds: uint32 [B]. limit: maximum number of new tokens, at least 1. capacity: T.
      gaps: whether positions have gaps; sliding windows then span positions instead of tokens.
      eviction: which keys and values stay in the cache; None for all. See `check_eviction`.
    """

    def filled(model, ids, lengths, positions, seeds, stop_tokens, sampling, limit):
        with jax.named_scope("prefill"):
            batch, kept = ids.shape
            slots = kept if eviction is None else eviction.slots(kept)
            cache = KVCache.empty(model.config, batch, slots + capacity, model.dtype, of_heads=eviction is not None)
            logits, cache = model.prefill(ids, lengths, positions, cache, gaps=gaps, eviction=eviction)
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
    specs = _decode_state_specs(of_heads=eviction is not None)
    run = sharding.on_devices(model, filled, (batch, batch, batch, batch, None, None, None), specs, seq="model")
    return run(ids, lengths, positions, seeds, stop_tokens, sampling, jnp.asarray(limit, jnp.int32))


def _decode_state_specs(*, of_heads: bool) -> DecodeState:
    batch = sharding.spec("batch")
    return DecodeState(
        tokens=batch,
        lengths=batch,
        stopped=batch,
        last=batch,
        positions=batch,
        cache=cache_specs(of_heads=of_heads),
        prompt=batch,
        prompt_positions=batch,
        keys=batch,
        limit=sharding.spec(),
        stop_tokens=sharding.spec(),
        sampling=sharding.spec(),
    )


def _take(state: DecodeState, logits: jax.Array) -> DecodeState:
    """Draw a token for each running row and append it."""
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
    """Logits [B, V] after each row's last token, and the extended cache.

    A row that grows past `LongRope`'s original context is prefilled again with the long table, as in Hugging Face's
    Phi-3.
    """
    scaling = model.config.rope_scaling

    def feed() -> tuple[jax.Array, KVCache]:
        return model.decode_step(state.last, state.positions, state.cache)

    def read_again() -> tuple[jax.Array, KVCache]:
        return model.prefill(*_sequence(state), state.cache)

    if not isinstance(scaling, LongRope) or state.cache.of_heads:
        return feed()
    crossing = state.running & (state.positions == scaling.original_context)
    return jax.lax.cond(collectives.any_row(crossing), read_again, feed)


def _sequence(state: DecodeState) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Prompt and new tokens of each row, joined: ids [B, K + T], lengths [B], rotary positions [B, K + T]."""
    lengths = state.cache.lengths + 1  # the last token is not in the cache yet
    new = jnp.arange(state.prompt.shape[1] + state.tokens.shape[1]) - (lengths - state.lengths)[:, None]
    columns = jnp.clip(new, 0, state.tokens.shape[1] - 1)
    room = ((0, 0), (0, state.tokens.shape[1]))
    ids = jnp.where(new < 0, jnp.pad(state.prompt, room), jnp.take_along_axis(state.tokens, columns, axis=1))
    first = (state.positions - state.lengths + 1)[:, None]
    positions = jnp.where(new < 0, jnp.pad(state.prompt_positions, room), first + new)
    return ids, lengths, positions


@functools.partial(jax.jit, donate_argnames=("state",))
def decode_step(model: Decoder, state: DecodeState) -> DecodeState:
    """Generate one more token for each running row; streaming calls this from the host. The given state is donated."""
    specs = _decode_state_specs(of_heads=state.cache.of_heads)
    return sharding.on_devices(model, _step, (specs,), specs, seq="model")(state)


@functools.partial(jax.jit, donate_argnames=("state",))
def decode(model: Decoder, state: DecodeState) -> DecodeState:
    """Run decode steps until no row is running. The given state is donated."""

    def stepped(model, state):
        step = functools.partial(_step, model)
        return jax.lax.while_loop(lambda state: collectives.any_row(state.running), step, state)

    specs = _decode_state_specs(of_heads=state.cache.of_heads)
    return sharding.on_devices(model, stepped, (specs,), specs, seq="model")(state)
