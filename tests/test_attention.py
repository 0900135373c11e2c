"""Attention against a float64 reference that does make the S x S array, and proof that the package does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemfilter_jax import attention

_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}

_causal = jax.jit(attention.causal)
_one_row = jax.jit(attention.one_row)


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Softmax attention q [Q, H, E], k, v [S, G, E], visible [Q, S], in float64."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x.astype(np.float64), repeats, axis=1) for x in (k, v))
    logits = np.einsum("qhe,khe->hqk", q.astype(np.float64), k) / np.sqrt(q.shape[-1])
    logits = np.where(visible, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.einsum("hqk,khe->qhe", weights / weights.sum(axis=-1, keepdims=True), v)


def _random(lengths: tuple[int, ...], heads: int, groups: int, dtype: str, queries: int | None = None):
    """Inputs as wide as the longest row; what lies beyond a row's length is large, to be seen if it leaks."""
    rng = np.random.default_rng(0)
    batch, width = len(lengths), max(lengths)
    q = rng.normal(size=(batch, queries or width, heads, 16))
    k, v = rng.normal(size=(2, batch, width, groups, 16))
    for row, length in enumerate(lengths):
        k[row, length:] = v[row, length:] = 1e4
    return [jnp.asarray(x, dtype) for x in (q, k, v)]


def _numpy(*arrays: jax.Array) -> list[np.ndarray]:
    return [np.asarray(x.astype(jnp.float32)) for x in arrays]


def _check_causal(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: tuple[int, ...], tolerance: float, window: int | None = None
) -> None:
    out = _causal(q, k, v, lengths=jnp.asarray(lengths, jnp.int32), window=window)
    assert out.dtype == q.dtype
    assert jnp.isfinite(out).all()
    q, k, v, out = _numpy(q, k, v, out)
    for row, length in enumerate(lengths):
        visible = np.tri(length, dtype=bool)
        if window is not None:
            visible &= ~np.tri(length, k=-window, dtype=bool)
        want = _attend(q[row, :length], k[row, :length], v[row, :length], visible)
        assert np.abs(out[row, :length] - want).max() < tolerance


@pytest.mark.parametrize(
    ("lengths", "heads", "groups", "dtype"),
    [
        pytest.param((1,), 4, 2, "float32", id="one token"),
        pytest.param((37,), 4, 2, "float32", id="less than a block"),
        pytest.param((512,), 4, 2, "float32", id="one block"),
        pytest.param((1101, 513, 512, 1), 4, 2, "float32", id="ragged, not a multiple of the block"),
        pytest.param((1101, 513, 512, 1), 4, 2, "bfloat16", id="bfloat16"),
        pytest.param((600, 40), 4, 1, "float32", id="one key head"),
        pytest.param((600, 40), 4, 1, "bfloat16", id="one key head, bfloat16"),
        pytest.param((600, 40), 3, 3, "float32", id="a key head for each query head"),
    ],
)
def test_causal_equals_the_reference(lengths, heads, groups, dtype):
    q, k, v = _random(lengths, heads, groups, dtype)
    _check_causal(q, k, v, lengths, _TOLERANCE[dtype])


@pytest.mark.parametrize("window", [1, 100, 512, 513, 1000, 2**30])
def test_causal_within_a_window(window):
    """Windows that end inside a block, at its edge, a block or two back, and wider than the prompt."""
    lengths = (1601, 700)
    _check_causal(*_random(lengths, 4, 2, "float32"), lengths, _TOLERANCE["float32"], window)


def test_causal_survives_large_logits():
    """Whole numbers and E = 16 make the logits, up to thousands, exact in float32: only the softmax can err."""
    lengths = (700, 90)
    q, k, v = _random(lengths, 4, 2, "float32")
    q, k = jnp.round(q * 20), jnp.round(jnp.minimum(k, 5.0) * 20)
    assert jnp.abs(jnp.einsum("be,be->b", q[0, :, 0], k[0, :, 0])).max() / 4 > 1000
    _check_causal(q, k, v, lengths, _TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", _TOLERANCE)
@pytest.mark.parametrize(("heads", "groups", "window"), [(4, 2, None), (4, 1, 100), (3, 3, 1)])
def test_one_row_equals_the_reference(heads, groups, window, dtype):
    lengths = (600, 77, 1)
    q, k, v = _random(lengths, heads, groups, dtype, queries=1)
    out = _one_row(q, k, v, lengths=jnp.asarray(lengths, jnp.int32), window=window)
    assert out.dtype == q.dtype
    q, k, v, out = _numpy(q, k, v, out)
    for row, length in enumerate(lengths):
        visible = np.arange(length)[None] >= length - (window or length)
        want = _attend(q[row], k[row, :length], v[row, :length], visible)
        assert np.abs(out[row] - want).max() < _TOLERANCE[dtype]


def test_causal_makes_no_square_array():
    """All temporaries of the compiled program together are smaller than an S x S array of single bytes."""
    length = 8192
    q = jax.ShapeDtypeStruct((1, length, 4, 8), jnp.float32)
    k = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    memory = _causal.lower(q, k, k, lengths=lengths).compile().memory_analysis()
    assert memory.temp_size_in_bytes < length**2
