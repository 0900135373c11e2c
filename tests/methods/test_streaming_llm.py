"""StreamingLLM against a whole cache of which the evicted tokens are hidden, and what its cache holds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from gemfilter_jax.config import LongRope
from gemfilter_jax.errors import UserError
from gemfilter_jax.generate import loop
from gemfilter_jax.generate.sampling import Sampling
from gemfilter_jax.methods import presets
from gemfilter_jax.methods.streaming_llm import StreamingLLM
from gemfilter_jax.models.transformer import Decoder

_LENGTHS, _WIDTH, _NEW = (60, 31, 64, 9), 64, 12
_WARM = Sampling(temperature=1.0, top_k=40, top_p=0.95)


def _prefill(model, method: StreamingLLM | None) -> loop.DecodeState:
    ids, lengths = loop.pad([tiny.random_ids(length) for length in _LENGTHS], _WIDTH)
    return loop.prefill(
        model,
        ids,
        lengths,
        jnp.arange(_WIDTH)[None].repeat(len(_LENGTHS), axis=0),
        stop_tokens=jnp.array([-1]),
        sampling=jax.tree.map(jnp.float32, _WARM),
        seeds=jnp.arange(len(_LENGTHS), dtype=jnp.uint32),
        limit=_NEW,
        capacity=_NEW,
        eviction=method,
    )


def _held(length: int, method: StreamingLLM) -> set[int]:
    """By definition: the first tokens and the last ones."""
    return {place for place in range(length) if place < method.sinks or place >= length - (method.keep - method.sinks)}


@pytest.mark.parametrize("method", [StreamingLLM(24, 4), StreamingLLM(31, 0), StreamingLLM(9, 8)], ids=str)
@pytest.mark.parametrize("windows", [None, (16, None, 16, None)], ids=["dense", "sliding windows"])
def test_it_decodes_as_if_evicted_tokens_were_hidden(method, windows):
    model = Decoder(dataclasses.replace(tiny.CONFIG, sliding_windows=windows), rngs=nnx.Rngs(0))
    whole = _prefill(model, None)
    hidden = np.asarray(whole.cache.positions).copy()
    for row, length in enumerate(_LENGTHS):
        hidden[row, [place not in _held(length, method) for place in range(hidden.shape[1])]] = -1
    masked = dataclasses.replace(whole, cache=dataclasses.replace(whole.cache, positions=jnp.asarray(hidden)))
    unmasked = np.asarray(loop.decode(model, _prefill(model, None)).tokens)
    want = np.asarray(loop.decode(model, masked).tokens)
    got = np.asarray(loop.decode(model, _prefill(model, method)).tokens)
    np.testing.assert_array_equal(got, want)
    assert (want != unmasked).any()


def test_the_cache_has_room_for_the_kept_tokens_alone():
    method = StreamingLLM(24, 4)
    cache = _prefill(tiny.decoder(), method).cache
    assert cache.keys.shape[2] == 24 + _NEW
    assert cache.lengths.tolist() == [min(length, 24) for length in _LENGTHS]
    positions = np.asarray(cache.positions)
    for row, length in enumerate(_LENGTHS):
        for layer, head in np.ndindex(positions.shape[0], positions.shape[2]):
            slots = positions[layer, row, head]
            assert set(slots[slots >= 0].tolist()) == _held(length, method)
    after = loop.decode(tiny.decoder(), _prefill(tiny.decoder(), method)).cache
    assert after.lengths.tolist() == [min(length, 24) + _NEW - 1 for length in _LENGTHS]


def test_keys_that_would_be_rotated_anew_are_not_evicted():
    scaling = LongRope((1.0,) * 4, (4.0,) * 4, original_context=100, attention_scaling=1.0)
    model = Decoder(dataclasses.replace(tiny.CONFIG, rope_scaling=scaling), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="LongRoPE rotates all keys anew"):
        _prefill(model, StreamingLLM(24))
    with pytest.raises(UserError, match="LongRoPE rotates all keys anew"):
        StreamingLLM(24).check(model)


def test_a_budget_is_a_number():
    preset = presets.preset_for(tiny.CONFIG)
    assert StreamingLLM.of("streaming_llm", preset).keep == preset.default.keep
    with pytest.raises(UserError, match="keeps a number of tokens"):
        StreamingLLM.of("streaming_llm", preset, keep="auto")
