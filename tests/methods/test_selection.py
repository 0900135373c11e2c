"""Selection: the reference implementation's data, an independent NumPy rule, and what must hold for any scores."""

import functools
import itertools
import math
from pathlib import Path

import bounds
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemfilter_jax.methods.selection import best_by_bisection, best_by_sorting, chunk_scores, pool, select
from gemfilter_jax.ops.key_scores import score_keys

_GOLDEN = Path(__file__).parents[1] / "golden" / "official_selection.npz"
_WIDTH = 24  # one width for all examples, so that each rule compiles once
# Sums and means of whole numbers over these kernels and chunks are exact in float32, so that ties are ties.
_RULES = {
    "tokens": {},
    "mean pool": {"pooling": "mean", "pool_size": 5},
    "max pool": {"pooling": "max", "pool_size": 4},
    "chunks": {"chunk": 5},
    "mean pool, then chunks": {"pooling": "mean", "pool_size": 4, "chunk": 6},
}

_select = jax.jit(select, static_argnames=("capacity", "pooling", "pool_size"))
_chunk_scores = jax.jit(chunk_scores)
_by_bisection = jax.jit(functools.partial(best_by_bisection, width=16))
_by_sorting = jax.jit(functools.partial(best_by_sorting, width=16))
_score_keys = jax.jit(score_keys, static_argnames=("normalisation",))
_reproducible = settings(deadline=None, max_examples=60, derandomize=True)


def _chunks(starts: np.ndarray, width: int, chunk: int) -> np.ndarray:
    return ((np.arange(width) - starts[:, None]) // chunk).astype(np.int32)


def _pooled(scores: list[float], kind: str, pool_size: int) -> list[float]:
    pooled = []
    for center in range(len(scores)):
        first = center - pool_size // 2
        near = [scores[i] for i in range(first, first + pool_size) if 0 <= i < len(scores)]
        pooled.append(max(near) if kind == "max" else sum(near) / pool_size)
    return pooled


def _chunked(scores: list[float], members: list[int], start: int, chunk: int) -> dict[int, float]:
    """The score of each member: the mean of the four best members of its chunk."""
    by_chunk: dict[int, list[int]] = {}
    for i in members:
        by_chunk.setdefault((i - start) // chunk, []).append(i)
    best = {c: sorted((scores[i] for i in inside), reverse=True)[:4] for c, inside in by_chunk.items()}
    return {i: sum(best[c]) / len(best[c]) for c, inside in by_chunk.items() for i in inside}


def _kept_by_rule(scores, length, keep, required, start, pooling="none", pool_size=1, chunk=1) -> list[int]:
    """What `select` keeps of one row, token by token in plain Python."""
    free = [i for i in range(length) if not required[i]]
    ranked = list(scores)
    if pooling != "none":
        neutral = 0.0 if pooling == "mean" else -math.inf
        ranked = _pooled([ranked[i] if i in free else neutral for i in range(len(ranked))], pooling, pool_size)
    if chunk > 1:
        ranked = _chunked(ranked, free, start, chunk)
    best = sorted(free, key=lambda i: (-ranked[i], i))
    return sorted(([i for i in range(length) if required[i]] + best)[:keep])


def _kept(selection, row: int) -> list[int]:
    """A row's kept indices, after checking that the row's unused entries say so."""
    indices, count = np.asarray(selection.indices)[row], int(selection.lengths[row])
    assert (indices[count:] == _WIDTH).all()
    return indices[:count].tolist()


def _selected(case, rule):
    scores, lengths, required, starts, keep = case
    pooling, chunks = _arguments(rule, starts)
    return _select(scores, lengths, keep=keep, capacity=_WIDTH, required=required, chunks=chunks, **pooling)


def _arguments(rule, starts):
    """The rule's pooling, and its chunks counted off from `starts`."""
    pooling = {name: value for name, value in rule.items() if name != "chunk"}
    return pooling, _chunks(starts, _WIDTH, rule["chunk"]) if "chunk" in rule else None


@st.composite
def _cases(draw, score):
    """Two rows of scores and lengths, required tokens, where chunks start, and a keep that holds what is required."""
    scores = draw(st.lists(st.lists(score, min_size=_WIDTH, max_size=_WIDTH), min_size=2, max_size=2))
    lengths = draw(st.lists(st.integers(1, _WIDTH), min_size=2, max_size=2))
    ends = [draw(st.tuples(st.integers(0, 4), st.integers(0, 4))) for _ in range(2)]
    columns = np.arange(_WIDTH)
    required = np.array(
        [
            (columns < prefix) | (columns >= length - suffix)
            for (prefix, suffix), length in zip(ends, lengths, strict=True)
        ]
    )
    needed = max(int(row[:length].sum()) for row, length in zip(required, lengths, strict=True))
    keep = draw(st.integers(max(needed, 1), _WIDTH + 4))
    starts = [prefix for prefix, _ in ends]
    return np.array(scores, np.float32), np.array(lengths, np.int32), required, np.array(starts, np.int32), keep


_whole_numbers = st.integers(-3, 3).map(float)
_nasty_numbers = st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-45, 1.0, -1.0, 3.4e38, -3.4e38])
_every_rule = pytest.mark.parametrize("rule", _RULES.values(), ids=_RULES)


@pytest.mark.parametrize("case", range(4))
def test_the_paper_rule_keeps_what_the_reference_implementation_keeps(case):
    golden = np.load(_GOLDEN)
    q, k, keep, want = (golden[f"gemfilter{case}_{name}"] for name in ("q_last", "k", "topk", "indices"))
    length = k.shape[1]
    scores = _score_keys(
        q[None, None],
        np.array([[length - 1]]),
        k.swapaxes(0, 1)[None],
        head_weights=np.ones(len(q), np.float32),
        normalisation="none",
    )
    kept = _select(scores, np.array([length]), keep=keep, capacity=int(keep), pooling="mean", pool_size=5)
    np.testing.assert_array_equal(kept.indices[0], np.sort(want))


@pytest.mark.parametrize("kind", ["mean", "max"])
@pytest.mark.parametrize("pool_size", [1, 2, 5, 6])
def test_pool_equals_the_reference(kind, pool_size):
    scores = np.random.default_rng(0).normal(size=(2, 40)).astype(np.float32)
    want = [_pooled(row.tolist(), kind, pool_size) for row in scores]
    bound = bounds.of_sum(pool_size + 1, np.abs(scores).max())
    np.testing.assert_allclose(pool(jnp.asarray(scores), kind, pool_size), want, rtol=0, atol=bound)


@pytest.mark.parametrize("chunk", [2, 4, 7, 50])
def test_chunk_scores_equal_the_reference(chunk):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 40)).astype(np.float32)
    counted = rng.uniform(size=(3, 40)) < 0.8
    starts = np.array([0, 3, 11])
    given_scores = np.asarray(_chunk_scores(scores, counted, _chunks(starts, 40, chunk)))
    for row in range(3):
        members = np.flatnonzero(counted[row])
        want = _chunked(scores[row].tolist(), members.tolist(), int(starts[row]), chunk)
        bound = bounds.of_sum(chunk + 1, np.abs(scores).max())
        np.testing.assert_allclose(given_scores[row, members], [want[i] for i in members], rtol=0, atol=bound)


def test_a_chunk_without_a_counted_token_scores_minus_infinity():
    counted = np.arange(12)[None] >= 4
    scores = _chunk_scores(np.ones((1, 12), np.float32), counted, np.arange(12)[None] // 4)
    np.testing.assert_array_equal(scores[0], [-np.inf] * 4 + [1.0] * 8)


@_every_rule
@_reproducible
@given(case=_cases(_whole_numbers))
def test_select_equals_the_reference(rule, case):
    scores, lengths, required, starts, keep = case
    kept = _selected(case, rule)
    for row in range(2):
        want = _kept_by_rule(scores[row].tolist(), lengths[row], keep, required[row], int(starts[row]), **rule)
        assert _kept(kept, row) == want


@_every_rule
@_reproducible
@given(case=_cases(_nasty_numbers))
def test_what_holds_for_any_scores(rule, case):
    _, lengths, required, _, keep = case
    selection = _selected(case, rule)
    for row in range(2):
        kept, length = _kept(selection, row), int(lengths[row])
        assert len(kept) == min(keep, length)
        assert all(before < after for before, after in itertools.pairwise(kept))
        assert all(0 <= i < length for i in kept)
        assert set(np.flatnonzero(required[row, :length])) <= set(kept)
        if keep >= length:
            assert kept == list(range(length))


@pytest.mark.parametrize("rule", [_RULES["chunks"], _RULES["mean pool, then chunks"]])
@_reproducible
@given(case=_cases(st.one_of(_whole_numbers, _nasty_numbers)))
def test_only_one_chunk_is_cut_and_only_at_its_end(rule, case):
    _, lengths, required, starts, _ = case
    selection = _selected(case, rule)
    for row in range(2):
        kept = set(_kept(selection, row))
        chunks: dict[int, list[int]] = {}
        for i in np.flatnonzero(~required[row, : lengths[row]]):
            chunks.setdefault((i - starts[row]) // rule["chunk"], []).append(i)
        cut = [inside for inside in chunks.values() if kept & set(inside) and not kept >= set(inside)]
        assert len(cut) <= 1
        for inside in cut:
            count = len(kept & set(inside))
            assert kept >= set(inside[:count])


@_every_rule
def test_ties_go_to_the_earlier_token(rule):
    pooling, chunks = _arguments(rule, np.zeros(1, int))
    scores = np.full((1, _WIDTH), 7.0, np.float32)
    kept = _select(scores, np.array([20]), keep=9, capacity=_WIDTH, chunks=chunks, **pooling)
    want = [2, 3, 4, 5, 6, 7, 8, 9, 10] if rule == _RULES["mean pool"] else list(range(9))
    assert _kept(kept, 0) == want


def test_zeros_of_both_signs_tie():
    scores = np.full((1, _WIDTH), 0.0, np.float32)
    scores[0, 0] = -0.0
    assert _kept(_select(scores, np.array([_WIDTH]), keep=1, capacity=_WIDTH), 0) == [0]


def test_scores_of_required_tokens_reach_no_neighbour():
    """A required token's great score would otherwise carry its neighbours past a better token elsewhere."""
    scores = np.zeros((1, _WIDTH), np.float32)
    scores[0, [0, 12]] = [100.0, 1.0]
    required = np.arange(_WIDTH)[None] == 0
    for rule in ({"pooling": "max", "pool_size": 3}, {"pooling": "mean", "pool_size": 3}, {"chunk": 4}):
        pooling, chunks = _arguments(rule, np.zeros(1, int))
        kept = _select(scores, np.array([_WIDTH]), keep=4, capacity=_WIDTH, required=required, chunks=chunks, **pooling)
        assert 12 in _kept(kept, 0)
        assert 1 not in _kept(kept, 0)


@_every_rule
def test_a_traced_keep_equals_a_static_one(rule):
    keep = 7
    scores = np.random.default_rng(0).normal(size=(2, _WIDTH)).astype(np.float32)
    lengths = np.array([_WIDTH, 11])
    pooling, chunks = _arguments(rule, np.zeros(2, int))
    static = jax.jit(functools.partial(select, keep=keep, capacity=keep, **pooling))(scores, lengths, chunks=chunks)
    traced = _select(scores, lengths, keep=jnp.int32(keep), capacity=_WIDTH, chunks=chunks, **pooling)
    np.testing.assert_array_equal(static.lengths, traced.lengths)
    for row, count in enumerate(traced.lengths.tolist()):
        np.testing.assert_array_equal(static.indices[row, :count], traced.indices[row, :count])


@pytest.mark.parametrize(
    ("share", "least", "keep", "kept"),
    [
        (0.5, 1, 99, 16),  # 2 required tokens and 3 of the best chunk, in the smallest bucket
        (0.95, 1, 99, 16),  # 2 required ones, the best chunk, the next, and 2 tokens of the third
        (1.0, 1, 99, 24),  # 4 tokens of the third
        (1.0, 1, 20, 20),
        (0.1, 30, 99, 32),
        (1.0, 41, 99, 40),  # never more than there are
    ],
)
def test_a_share_of_the_score_decides_how_many_are_kept(share, least, keep, kept):
    """Chunks of 6 after two required tokens; three have a score, 8, 1 and 1 of 10, the other tokens none."""
    scores = np.zeros((1, 48), np.float32)
    for first, total in ((2, 1.0), (14, 8.0), (26, 1.0)):
        scores[0, first : first + 4] = total / 4
    required = np.zeros(scores.shape, bool)
    required[0, :2] = True
    chunks = np.maximum(np.arange(48) - 2, -1)[None] // 6
    selection = _select(
        jnp.asarray(scores), jnp.asarray([40]), keep=keep, capacity=96, required=jnp.asarray(required),
        chunks=jnp.asarray(chunks), share=share, least=least,
    )  # fmt: skip
    assert int(selection.lengths[0]) == kept
    indices = np.asarray(selection.indices[0, :kept])
    assert {0, 1, *range(14, 20)} <= set(indices.tolist())


@_reproducible
@given(
    st.lists(
        st.lists(
            st.sampled_from([-math.inf, math.inf, 0.0, 1e-45, -1e-45, 1.0, 2.0, -1.0, 3.4e38]) | st.floats(width=32),
            min_size=_WIDTH,
            max_size=_WIDTH,
        ),
        min_size=2,
        max_size=2,
    ),
    st.lists(st.integers(0, 16), min_size=2, max_size=2),
)
def test_bisection_keeps_what_sorting_keeps(scores, kept):
    ranked = np.nan_to_num(np.array(scores, np.float32), posinf=np.inf, neginf=-np.inf) + 0.0
    kept = np.array(kept, np.int32)
    np.testing.assert_array_equal(_by_bisection(ranked, kept), _by_sorting(ranked, kept))


def test_bisection_at_length():
    ranked = np.random.default_rng(0).normal(size=(2, 131_072)).astype(np.float32).round(2)  # many ties
    kept = np.array([1024, 777], np.int32)
    found = jax.jit(best_by_bisection, static_argnames="width")(ranked, kept, width=1024)
    for row, count in enumerate(kept):
        want = np.sort(np.argsort(-ranked[row], kind="stable")[:count])
        np.testing.assert_array_equal(found[row, :count], want)
        assert (np.asarray(found[row, count:]) == 131_072).all()
