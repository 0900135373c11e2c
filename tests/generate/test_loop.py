"""Stage 2 as a program: rows do not disturb each other, streaming is finishing, rows stop where and why they should."""

import dataclasses

import bounds
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from gemfilter_jax.generate import loop
from gemfilter_jax.generate.loop import pad
from gemfilter_jax.generate.sampling import GREEDY, Sampling
from gemfilter_jax.models.transformer import Decoder

_WIDTH = 32
_CAPACITY = 16
_LIMIT = 12
_NO_STOP = (-1, -1)
_COMPACT = np.arange(_WIDTH, dtype=np.int32)
_WARM = Sampling(temperature=1.0, top_k=40, top_p=0.95)
_PROMPTS = [tiny.random_ids(length) for length in (20, 32, 1, 9)]


def _begin(
    rows, *, model=None, positions=_COMPACT, stops=_NO_STOP, sampling=GREEDY, seeds=None, limit=_LIMIT, gaps=False
):
    ids, lengths = pad(rows, _WIDTH)
    return loop.prefill(
        model or tiny.decoder(),
        ids,
        lengths,
        jnp.asarray(np.tile(positions, (len(rows), 1))),
        stop_tokens=jnp.asarray(stops, jnp.int32),
        sampling=jax.tree.map(jnp.float32, sampling),
        seeds=jnp.asarray(range(len(rows)) if seeds is None else seeds, jnp.uint32),
        limit=jnp.int32(limit),
        capacity=_CAPACITY,
        gaps=gaps,
    )


def _tokens(state: loop.DecodeState) -> list[list[int]]:
    rows = zip(np.asarray(state.tokens), np.asarray(state.lengths), strict=True)
    return [tokens[:count].tolist() for tokens, count in rows]


def _generate(rows, **options) -> list[list[int]]:
    return _tokens(loop.decode(tiny.decoder(), _begin(rows, **options)))


@pytest.fixture(scope="module")
def warm() -> list[list[int]]:
    """What the prompts' rows draw without any stop token: varied enough to put stop tokens into."""
    return _generate(_PROMPTS, sampling=_WARM)


@pytest.mark.parametrize("sampling", [GREEDY, _WARM], ids=["greedy", "sampled"])
def test_a_batch_equals_its_rows_one_by_one(sampling):
    together = _generate(_PROMPTS, sampling=sampling)
    alone = [_generate([prompt], sampling=sampling, seeds=[seed])[0] for seed, prompt in enumerate(_PROMPTS)]
    assert together == alone
    assert len(set(map(tuple, together))) == len(_PROMPTS)


def test_each_token_is_what_a_fresh_prefill_would_choose():
    """The cache, the positions and the masks of decoding are right if they change nothing."""
    prompts = [_PROMPTS[0], _PROMPTS[0][5:15], _PROMPTS[2], _PROMPTS[3]]
    generated = _generate(prompts)
    for count in range(_LIMIT):
        grown = [np.concatenate([p, tokens[:count]]) for p, tokens in zip(prompts, generated, strict=True)]
        assert _generate(grown, limit=1) == [[tokens[count]] for tokens in generated]


@pytest.mark.parametrize("sampling", [GREEDY, _WARM], ids=["greedy", "sampled"])
def test_streaming_equals_finishing(sampling, warm):
    stops = (warm[0][4], warm[3][7])
    state = _begin(_PROMPTS, stops=stops, sampling=sampling)
    steps = 0
    while state.running.any():
        before = _tokens(state)
        state = loop.decode_step(tiny.decoder(), state)
        steps += 1
        assert all(new[: len(old)] == old for old, new in zip(before, _tokens(state), strict=True))
    assert _tokens(state) == _generate(_PROMPTS, stops=stops, sampling=sampling)
    assert steps == max(map(len, _tokens(state))) - 1


def test_a_step_leaves_finished_rows_alone(warm):
    state = loop.decode(tiny.decoder(), _begin(_PROMPTS, stops=(warm[0][4], -1), sampling=_WARM))
    done = jax.device_get((state.tokens, state.lengths, state.stopped, state.positions, state.cache.lengths))
    after = loop.decode_step(tiny.decoder(), state)
    again = jax.device_get((after.tokens, after.lengths, after.stopped, after.positions, after.cache.lengths))
    jax.tree.map(np.testing.assert_array_equal, done, again)


def test_each_row_stops_by_itself_at_the_first_of_several_stop_tokens(warm):
    stops = (warm[0][4], warm[3][7])
    want = []
    for tokens in warm:
        ends = [place for place, token in enumerate(tokens) if token in stops]
        want.append(tokens[: ends[0] + 1] if ends else tokens)
    state = loop.decode(tiny.decoder(), _begin(_PROMPTS, stops=stops, sampling=_WARM))
    assert _tokens(state) == want
    assert state.stopped.tolist() == [tokens[-1] in stops for tokens in want]
    assert len(set(map(len, want))) > 1
    assert not state.running.any()


def test_the_first_token_may_stop_a_row(warm):
    assert _generate(_PROMPTS[:1], stops=(-1, warm[0][0]), sampling=_WARM) == [warm[0][:1]]


@pytest.mark.parametrize("limit", [1, 5, _CAPACITY])
def test_the_limit_is_met_exactly(limit, warm):
    state = loop.decode(tiny.decoder(), _begin(_PROMPTS, limit=limit, sampling=_WARM))
    assert state.lengths.tolist() == [limit] * len(_PROMPTS)
    assert [row[:_LIMIT] for row in _tokens(state)] == [row[:limit] for row in warm]
    assert not state.stopped.any()
    assert (np.asarray(state.tokens)[:, limit:] == 0).all()


def test_a_stop_token_at_the_limit_counts_as_a_stop(warm):
    limit = next(place for place in range(1, _LIMIT) if warm[0][place] not in warm[0][:place])
    stops = (warm[0][limit], -1)
    state = loop.decode(tiny.decoder(), _begin(_PROMPTS[:1], stops=stops, sampling=_WARM, limit=limit + 1))
    assert _tokens(state) == [warm[0][: limit + 1]]
    assert state.stopped.tolist() == [True]


def test_seeds_decide_what_is_drawn():
    prompt = [_PROMPTS[0]] * 4
    first, same, other, another = _generate(prompt, sampling=_WARM, seeds=[5, 5, 6, 2**32 - 1])
    assert first == same
    assert len(set(map(tuple, (first, other, another)))) == 3
    assert _generate(prompt, sampling=_WARM, seeds=[7, 8, 9, 5])[3] == first


def test_every_token_is_drawn_anew():
    """A model of zeros finds all tokens alike: a random key used twice would draw the same one twice."""
    blank = jax.tree.map(np.zeros_like, tiny.decoder())
    state = loop.decode(blank, _begin(_PROMPTS, model=blank, sampling=_WARM))
    assert all(len(set(tokens)) > _LIMIT / 2 for tokens in _tokens(state))


def _last_values(positions: np.ndarray) -> np.ndarray:
    """The last layer's values of a prompt: they hold what all layers below it attended to."""
    return np.asarray(_begin(_PROMPTS[:1], positions=positions).cache.values[-1, 0, : len(_PROMPTS[0])])


def _bound(values: np.ndarray, last: int) -> float:
    """For prompts whose positions go up to `last`, with angles of queries and keys that err by so many units."""
    return bounds.of_decoder(tiny.CONFIG, len(_PROMPTS[0]) + 2 * last, np.abs(values).max())


def test_positions_matter_only_where_they_leave_gaps():
    """Rotary attention sees distances: a shift changes none, a gap does."""
    gapped = _COMPACT + 50 * (_COMPACT > 10)
    want = _last_values(_COMPACT)
    bound = _bound(want, 50 + _WIDTH)
    np.testing.assert_allclose(_last_values(_COMPACT + 50), want, rtol=0, atol=bound)
    np.testing.assert_allclose(_last_values(gapped)[:11], want[:11], rtol=0, atol=bound)
    assert (np.abs(_last_values(gapped) - want)[11:].max(axis=(1, 2)) > 10 * bound).all()


def test_new_tokens_continue_the_last_position():
    state = _begin(_PROMPTS, positions=_COMPACT * 3)
    assert state.positions.tolist() == [3 * (len(prompt) - 1) + 1 for prompt in _PROMPTS]
    state = loop.decode(tiny.decoder(), state)
    assert state.positions.tolist() == [3 * (len(prompt) - 1) + _LIMIT for prompt in _PROMPTS]


def test_sliding_windows_count_positions_where_tokens_leave_gaps():
    """Behind a gap wider than the window a prompt is as if it began there, in prefill and in decoding."""
    config = dataclasses.replace(tiny.CONFIG, sliding_windows=(8, 8, 8, 8))
    model = Decoder(config, rngs=nnx.Rngs(0))
    whole = _begin(_PROMPTS[:1], model=model, positions=_COMPACT + 50 * (_COMPACT >= 10), gaps=True)
    behind = _begin([_PROMPTS[0][10:]], model=model, positions=_COMPACT + 60, gaps=True)
    values, want = (np.asarray(state.cache.values[-1, 0]) for state in (whole, behind))
    np.testing.assert_allclose(values[10:20], want[:10], rtol=0, atol=_bound(want, 60 + _WIDTH))
    assert _tokens(loop.decode(model, whole)) == _tokens(loop.decode(model, behind))
