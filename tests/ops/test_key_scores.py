"""Selection scores against a float64 reference that makes the [H, W, S] array, and proof that the package does not."""

import contextlib
import functools
import math

import bounds
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64_scores import inputs, largest_error, reference
from jax.experimental.pallas import tpu as pltpu

from gemfilter_jax.errors import UserError
from gemfilter_jax.ops import dispatch
from gemfilter_jax.ops.key_scores import score_keys, score_keys_by_all_rows

_NORMALISATIONS = ("none", "softmax", "sink")
_TPU_KERNELS = pytest.param("pallas", marks=pytest.mark.skipif(jax.default_backend() == "gpu", reason="TPU's alone"))
_IMPLEMENTATIONS = ("xla", _TPU_KERNELS)

_score = jax.jit(score_keys, static_argnames=("normalisation", "implementation"))


@functools.partial(jax.jit, static_argnames=("normalisation", "implementation"))
def _score_by_all_rows(*args, **options):
    return score_keys_by_all_rows(*args, **options)


def _simulated(implementation: str) -> contextlib.AbstractContextManager:
    """TPU kernels run on a simulated TPU, whose fresh memory holds NaN."""
    return pltpu.force_tpu_interpret_mode() if implementation == "pallas" else contextlib.nullcontext()


def _assert_close(scores: jax.Array, want: np.ndarray, error: float):
    assert np.abs(np.asarray(scores) - want).max() / np.abs(want).max() < error


@pytest.mark.parametrize("implementation", _IMPLEMENTATIONS)
@pytest.mark.parametrize("normalisation", _NORMALISATIONS)
def test_large_logits_stay_finite(normalisation, implementation):
    q, rows, k, weights = inputs((1100, 20), 32, 4, 2)
    with _simulated(implementation):
        scores = np.asarray(
            _score(
                q * 100, rows, k * 100, head_weights=weights, normalisation=normalisation, implementation=implementation
            )
        )
    assert np.isfinite(scores).all()
    if normalisation == "softmax":
        mass = weights.sum(dtype=np.float64) * (rows >= 0).sum(axis=1)
        # Whatever the products, the probabilities of a row add up to one; they are rounded in every block of keys.
        rounded = bounds.of_scores(scores.shape[1], 0, q.shape[-1], rows.shape[1], q.shape[2])
        np.testing.assert_allclose(scores.sum(axis=1, dtype=np.float64), mass, rtol=rounded)


@pytest.mark.parametrize("normalisation", ["softmax", "sink"])
def test_a_window_counts_positions_where_they_have_gaps(normalisation):
    lengths, window = (1100, 70), 100  # more keys than a block, gaps of 0 to 4
    q, rows, k, weights = inputs(lengths, 16, 4, 2)
    positions = np.cumsum(np.random.default_rng(1).integers(1, 6, (2, max(lengths))), axis=1)
    ask = functools.partial(_score, q, rows, k, head_weights=weights, normalisation=normalisation, window=window)
    scores, without = np.asarray(ask(positions=positions)), np.asarray(ask())
    for row, length in enumerate(lengths):
        case = (q[row], rows[row], k[row, :length], weights, normalisation, window, None, positions[row, :length])
        want = reference(*case)
        assert (np.abs(scores[row, :length] - want) <= largest_error(*case)).all()
        assert ((want == 0) != (without[row, :length] == 0)).any()
    with pytest.raises(UserError, match="masks a sliding window by slots"):
        ask(positions=positions, implementation="pallas")


@pytest.mark.parametrize("implementation", _IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("normalisation", "window"), [("none", None), ("softmax", None), ("softmax", 50), ("sink", None)]
)
def test_all_rows_in_blocks_equal_all_rows_at_once(normalisation, window, implementation):
    lengths = (150, 70)
    q, _, k, weights = inputs(lengths, max(lengths), 4, 2)
    with _simulated(implementation):
        scores = _score_by_all_rows(
            q,
            np.asarray(lengths),
            k,
            head_weights=weights,
            normalisation=normalisation,
            window=window,
            implementation=implementation,
        ).block_until_ready()
    for row, length in enumerate(lengths):
        rows = np.where(np.arange(max(lengths)) < length, np.arange(max(lengths)), -1)
        _assert_close(scores[row], reference(q[row], rows, k[row], weights, normalisation, window), 1e-5)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="another kernel with reasons of its own")
def test_what_the_kernel_cannot_serve_is_refused_with_the_reason():
    q, rows, k, weights = inputs((2000,), 2000, 32, 8)
    with pytest.raises(UserError, match="pallas: 64000 rows and 8 x 16 keys leave no room in VMEM"):
        _score(q, rows, k, head_weights=weights, normalisation="softmax", implementation="pallas")
    with pytest.raises(UserError, match="pallas: queries float32 and keys float16"):
        _score(q, rows, k.astype(np.float16), head_weights=weights, normalisation="softmax", implementation="pallas")


def test_xla_scores_what_the_kernel_cannot_serve(monkeypatch, caplog):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    dispatch.log_once.cache_clear()
    q, rows, k, weights = inputs((40,), 4, 4, 2)
    with caplog.at_level("DEBUG", logger="absl"):
        scores = score_keys(q, rows, k.astype(np.float16), head_weights=weights, normalisation="softmax")
    _assert_close(scores[0], reference(q[0], rows[0], k[0].astype(np.float16), weights, "softmax"), 1e-5)
    refused = "queries float32 and keys float16; both must be bfloat16 or both float32"
    assert caplog.messages == ["key scores: xla", f"key scores: not pallas: {refused}"]


def test_xla_scores_where_it_would_have_to_partition_a_kernel(monkeypatch, caplog):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    dispatch.log_once.cache_clear()
    q, rows, k, weights = inputs((40,), 4, 4, 2)
    with caplog.at_level("DEBUG", logger="absl"):
        score_keys(q, rows, k, head_weights=weights, normalisation="softmax")
    assert caplog.messages == [
        "key scores: xla",
        "key scores: not pallas: XLA cannot partition a kernel over this process's 4 devices",
    ]


def test_sink_scores_do_not_depend_on_the_segment():
    """A key scores the same in a segment of its own as in the whole prompt, if both begin with the same key."""
    q, rows, k, weights = inputs((90,), 4, 4, 2)
    whole = np.asarray(_score(q, rows, k, head_weights=weights, normalisation="sink"))
    kept = [0, *range(50, 90)]
    part = np.asarray(_score(q, rows - 49, k[:, kept], head_weights=weights, normalisation="sink"))
    norms = (np.linalg.norm(np.asarray(x), axis=-1).max() for x in (q, k))
    largest = math.prod(norms) * q.shape[-1] ** -0.5
    bound = bounds.of_scores(whole.shape[1], largest, q.shape[-1], rows.shape[1], q.shape[2])
    np.testing.assert_allclose(part, whole[:, kept], rtol=2 * bound)


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
