"""Attention against a float64 reference that does make the S x S array, and proof that the package does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemfilter_jax import attention
from gemfilter_jax.attention import TriShape

_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}

_causal = jax.jit(attention.causal)
_rows = jax.jit(attention.rows)
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
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: tuple[int, ...],
    tolerance: float,
    window: int | None = None,
    pattern: TriShape | None = None,
) -> None:
    out = _causal(q, k, v, lengths=jnp.asarray(lengths, jnp.int32), window=window, pattern=pattern)
    assert out.dtype == q.dtype
    assert jnp.isfinite(out).all()
    q, k, v, out = _numpy(q, k, v, out)
    for row, length in enumerate(lengths):
        visible = np.tri(length, dtype=bool)
        if pattern is not None:
            visible &= ~np.tri(length, k=-pattern.band, dtype=bool)
            visible[:, : pattern.first] = np.tri(length, dtype=bool)[:, : pattern.first]
            tail = max(length - int(pattern.tails[row]), 0)
            visible[tail:] = np.tri(length, dtype=bool)[tail:]
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


@pytest.mark.parametrize("window", [None, 300, 60])
@pytest.mark.parametrize(
    "pattern",
    [
        TriShape(np.array([64, 50, 64]), first=64, band=512, room=64),
        TriShape(np.array([0, 0, 0]), first=0, band=100, room=0),
        TriShape(np.array([1, 0, 2]), first=300, band=1, room=2),
        TriShape(np.array([200, 333, 333]), first=5, band=700, room=333),
        TriShape(np.array([3000, 3000, 3000]), first=3000, band=3000, room=3000),
    ],
    ids=lambda pattern: f"first {pattern.first}, band {pattern.band}, tails up to {pattern.room}",
)
def test_tri_shape_equals_the_reference(pattern, window):
    """First tokens, bands and tails that end inside blocks, reach over several, and exceed the prompt."""
    lengths = (1101, 700, 30)
    _check_causal(*_random(lengths, 4, 2, "float32"), lengths, _TOLERANCE["float32"], window, pattern)


@pytest.mark.parametrize("window", [None, 100])
def test_rows_equal_the_reference(window):
    lengths = (1300, 600, 5)
    q, k, v = _random(lengths, 4, 2, "float32", queries=7)
    positions = np.asarray(lengths)[:, None] - 7 + np.arange(7)
    out = _rows(q, jnp.asarray(positions), k, v, window=window)
    q, k, v, out = _numpy(q, k, v, out)
    for row, length in enumerate(lengths):
        distance = positions[row][:, None] - np.arange(length)
        visible = (distance >= 0) & (distance < (window or length))
        real = positions[row] >= 0
        want = _attend(q[row][real], k[row, :length], v[row, :length], visible[real])
        assert np.abs(out[row][real] - want).max() < _TOLERANCE["float32"]


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


@pytest.mark.parametrize("pattern", [None, TriShape(np.array([64]), first=64, band=512, room=64)])
def test_causal_makes_no_square_array(pattern):
    """All temporaries of the compiled program together are smaller than an S x S array of single bytes."""
    length = 8192
    q = jax.ShapeDtypeStruct((1, length, 4, 8), jnp.float32)
    k = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    memory = _causal.lower(q, k, k, lengths=lengths, pattern=pattern).compile().memory_analysis()
    assert memory.temp_size_in_bytes < length**2
