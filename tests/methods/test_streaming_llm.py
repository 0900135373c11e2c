"""StreamingLLM against a whole cache of which the evicted tokens are hidden, and what its cache holds."""

import contextlib
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
@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id="dense"),
        pytest.param({"sliding_windows": (16, None, 16, None)}, id="sliding windows"),
        pytest.param({"rope_scaling": LongRope((1.0,) * 4, (4.0,) * 4, 25, 1.0)}, id="LongRoPE, crossed by no row"),
    ],
)
def test_it_decodes_as_if_evicted_tokens_were_hidden(method, change):
    model = Decoder(dataclasses.replace(tiny.CONFIG, **change), rngs=nnx.Rngs(0))
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
    long = LongRope((1.0,) * 4, (4.0,) * 4, original_context=100, attention_scaling=1.0)
    model = tiny.pipeline(Decoder(dataclasses.replace(tiny.CONFIG, rope_scaling=long), rngs=nnx.Rngs(0)))
    for words, crosses in ((89, False), (90, True), (97, True), (98, False)):  # and three of the question
        crossing = pytest.raises(UserError, match="cross 100 tokens, where LongRoPE rotates all keys anew")
        with crossing if crosses else contextlib.nullcontext():
            model.generate(tiny.words(words), "w1 w2 w3", method="streaming_llm", max_new_tokens=8)


def test_a_budget_is_a_number():
    preset = presets.preset_for(tiny.CONFIG)
    assert StreamingLLM.of("streaming_llm", preset).keep == preset.default.keep
    with pytest.raises(UserError, match="keeps a number of tokens"):
        StreamingLLM.of("streaming_llm", preset, keep="auto")
