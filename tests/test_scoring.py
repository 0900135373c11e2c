"""Selection scores against a float64 reference that makes the [H, W, S] array, and proof that the package does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemfilter_jax.scoring import score_keys

_NORMALISATIONS = ("none", "softmax", "sink")

_score = jax.jit(score_keys, static_argnames=("normalisation",))


def _reference(q: np.ndarray, rows: np.ndarray, k: np.ndarray, weights: np.ndarray, normalisation: str) -> np.ndarray:
    """One prompt: q [W, H, E], rows [W], k [S, G, E] -> [S]."""
    q, k = q.astype(np.float64)[rows >= 0], k.astype(np.float64)
    rows = rows[rows >= 0]
    products = np.einsum("whe,she->hws", q, np.repeat(k, q.shape[1] // k.shape[1], axis=1))
    if normalisation == "none":
        return np.einsum("hws,h->s", products, weights)
    logits = np.where(np.arange(len(k)) <= rows[:, None], products / np.sqrt(q.shape[-1]), -np.inf)
    if normalisation == "softmax":
        masses = np.exp(logits - logits.max(axis=-1, keepdims=True))
        masses /= masses.sum(axis=-1, keepdims=True)
    else:
        masses = np.exp(logits - logits[..., :1])
    return np.einsum("hws,h->s", masses, weights)


def _inputs(lengths: tuple[int, ...], window: int, heads: int, groups: int):
    rng = np.random.default_rng(0)
    width = max(lengths)
    q = rng.normal(size=(len(lengths), window, heads, 16)).astype(np.float32)
    k = rng.normal(size=(len(lengths), width, groups, 16)).astype(np.float32)
    rows = np.asarray(lengths)[:, None] - window + np.arange(window)
    weights = rng.uniform(size=heads).astype(np.float32)
    weights[0] = 0.0
    return q, rows, k, weights


@pytest.mark.parametrize("normalisation", _NORMALISATIONS)
@pytest.mark.parametrize(
    ("lengths", "window", "heads", "groups"),
    [
        pytest.param((40, 17), 1, 4, 2, id="the last row alone"),
        pytest.param((40, 33, 20, 1), 32, 4, 2, id="prompts shorter than the window"),
        pytest.param((1500, 1024, 1025), 32, 4, 2, id="several blocks of keys, the last one short"),
        pytest.param((100,), 8, 4, 1, id="one key head"),
        pytest.param((100,), 8, 3, 3, id="a key head for each query head"),
    ],
)
def test_scores_equal_the_reference(lengths, window, heads, groups, normalisation):
    q, rows, k, weights = _inputs(lengths, window, heads, groups)
    scores = np.asarray(_score(q, rows, k, head_weights=weights, normalisation=normalisation))
    for row in range(len(lengths)):
        want = _reference(q[row], rows[row], k[row], weights, normalisation)
        assert np.abs(scores[row] - want).max() / np.abs(want).max() < 1e-5


@pytest.mark.parametrize("normalisation", _NORMALISATIONS)
def test_large_logits_stay_finite(normalisation):
    q, rows, k, weights = _inputs((1100, 20), 32, 4, 2)
    scores = np.asarray(_score(q * 100, rows, k * 100, head_weights=weights, normalisation=normalisation))
    assert np.isfinite(scores).all()
    if normalisation == "softmax":
        mass = weights.sum(dtype=np.float64) * (rows >= 0).sum(axis=1)
        np.testing.assert_allclose(scores.sum(axis=1, dtype=np.float64), mass, rtol=1e-5)


def test_sink_scores_do_not_depend_on_the_segment():
    """A key scores the same in a segment of its own as in the whole prompt, if both begin with the same key."""
    q, rows, k, weights = _inputs((90,), 4, 4, 2)
    whole = np.asarray(_score(q, rows, k, head_weights=weights, normalisation="sink"))
    kept = [0, *range(50, 90)]
    part = np.asarray(_score(q, rows - 49, k[:, kept], head_weights=weights, normalisation="sink"))
    np.testing.assert_allclose(part, whole[:, kept], rtol=1e-5)


@pytest.mark.parametrize("normalisation", _NORMALISATIONS)
def test_no_array_of_all_rows_and_keys_is_made(normalisation):
    """All temporaries of the compiled program together are smaller than half of a float32 [H, W, S] array."""
    length, window, heads = 32768, 32, 8
    q = jax.ShapeDtypeStruct((1, window, heads, 8), jnp.float32)
    k = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    rows = jax.ShapeDtypeStruct((1, window), jnp.int32)
    weights = jax.ShapeDtypeStruct((heads,), jnp.float32)
    program = _score.lower(q, rows, k, head_weights=weights, normalisation=normalisation).compile()
    assert program.memory_analysis().temp_size_in_bytes < heads * window * length * 4 / 2
