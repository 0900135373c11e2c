"""Attention against a float64 reference that does make the S x S array, and proof that the package does not."""

import functools

import bounds
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gemfilter_jax import pipeline
from gemfilter_jax.errors import UserError
from gemfilter_jax.models.transformer import Decoder
from gemfilter_jax.ops import attention
from gemfilter_jax.ops.attention import TriShape, cudnn, splash

_ROUNDINGS = {"float32": 0.0, "bfloat16": 3 * 2.0**-8}  # of weights, of sums that are handed on, and of the result

_ON = jax.default_backend()
_XLA = jax.jit(functools.partial(attention.causal, implementation="xla"))
_CAUSAL = {
    "xla": _XLA,
    "splash": jax.jit(functools.partial(splash.causal, interpret=_ON != "tpu"), static_argnames="window"),
}
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


def _assert_attends(
    out: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    visible: np.ndarray,
    dtype: str,
    *,
    exact: bool = False,
) -> None:
    """No number of `out` is further from the reference than rounding allows; products of q and k may be exact."""
    width = q.shape[-1]
    largest = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max() / np.sqrt(width)
    allowed = bounds.of_attention(visible.sum(axis=-1), 0.0 if exact else largest, width) + _ROUNDINGS[dtype]
    error = np.abs(out - _attend(q, k, v, visible))
    assert (error <= allowed[:, None, None] * _attend(q, k, np.abs(v), visible)).all()


def _random(
    lengths: tuple[int, ...], heads: int, groups: int, dtype: str, queries: int | None = None, head_width: int = 16
):
    """Inputs as wide as the longest row; what lies beyond a row's length is large, to be seen if it leaks."""
    rng = np.random.default_rng(0)
    batch, width = len(lengths), max(lengths)
    q = rng.normal(size=(batch, queries or width, heads, head_width))
    k, v = rng.normal(size=(2, batch, width, groups, head_width))
    for row, length in enumerate(lengths):
        k[row, length:] = v[row, length:] = 1e4
    return [jnp.asarray(x, dtype) for x in (q, k, v)]


def _numpy(*arrays: jax.Array) -> list[np.ndarray]:
    return [np.asarray(x.astype(jnp.float32)) for x in arrays]


def _check_causal(
    implementation: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: tuple[int, ...],
    window: int | None = None,
    pattern: TriShape | None = None,
    *,
    exact: bool = False,
) -> None:
    out = _CAUSAL[implementation](q, k, v, lengths=jnp.asarray(lengths, jnp.int32), window=window, pattern=pattern)
    assert out.dtype == q.dtype
    assert jnp.isfinite(out).all()
    dtype = str(q.dtype)
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
        given = (one[row, :length] for one in (out, q, k, v))
        _assert_attends(*given, visible, dtype, exact=exact)


@pytest.mark.parametrize("implementation", _CAUSAL)
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
def test_causal_equals_the_reference(implementation, lengths, heads, groups, dtype):
    q, k, v = _random(lengths, heads, groups, dtype)
    _check_causal(implementation, q, k, v, lengths)


@pytest.mark.parametrize("implementation", _CAUSAL)
@pytest.mark.parametrize("head_width", [96, 128])
def test_head_widths(implementation, head_width):
    lengths = (300, 7)
    _check_causal(implementation, *_random(lengths, 4, 2, "float32", head_width=head_width), lengths)


@pytest.mark.parametrize("implementation", _CAUSAL)
@pytest.mark.parametrize("window", [1, 100, 512, 513, 1000, 2**30])
def test_causal_within_a_window(implementation, window):
    """Windows that end inside a block, at its edge, a block or two back, and wider than the prompt."""
    lengths = (1601, 700)
    _check_causal(implementation, *_random(lengths, 4, 2, "float32"), lengths, window)


@pytest.mark.parametrize(
    ("implementation", "window"), [("xla", None), ("xla", 300), ("xla", 60), ("splash", None), ("splash", 300)]
)
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
def test_tri_shape_equals_the_reference(implementation, pattern, window):
    """First tokens, bands and tails that end inside blocks, reach over several, and exceed the prompt."""
    lengths = (1101, 700, 30)
    _check_causal(implementation, *_random(lengths, 4, 2, "float32"), lengths, window, pattern)


@pytest.mark.parametrize("window", [None, 100, 2**30])
def test_cudnn_equals_the_reference(window, monkeypatch):
    """Where there is no GPU, what cuDNN is asked for is computed by XLA."""
    if _ON != "gpu":
        attend = jax.nn.dot_product_attention
        monkeypatch.setattr(
            jax.nn, "dot_product_attention", lambda *qkv, **asked: attend(*qkv, **asked | {"implementation": "xla"})
        )
    monkeypatch.setitem(_CAUSAL, "cudnn", jax.jit(cudnn.causal, static_argnames="window"))
    lengths = (1101, 513, 1)
    _check_causal("cudnn", *_random(lengths, 4, 2, "bfloat16"), lengths, window)


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
        _assert_attends(out[row][real], q[row][real], k[row, :length], v[row, :length], visible[real], "float32")


@pytest.mark.parametrize("implementation", _CAUSAL)
def test_causal_survives_large_logits(implementation):
    """Whole numbers and E = 16 make the logits, up to thousands, exact in float32: only the softmax can err."""
    lengths = (700, 90)
    q, k, v = _random(lengths, 4, 2, "float32")
    q, k = jnp.round(q * 20), jnp.round(jnp.minimum(k, 5.0) * 20)
    assert jnp.abs(jnp.einsum("be,be->b", q[0, :, 0], k[0, :, 0])).max() / 4 > 1000
    _check_causal(implementation, q, k, v, lengths, exact=True)


@pytest.mark.parametrize("dtype", _ROUNDINGS)
@pytest.mark.parametrize(("heads", "groups", "window"), [(4, 2, None), (4, 1, 100), (3, 3, 1)])
def test_one_row_equals_the_reference(heads, groups, window, dtype):
    lengths = (600, 77, 1)
    q, k, v = _random(lengths, heads, groups, dtype, queries=1)
    out = _one_row(q, k, v, lengths=jnp.asarray(lengths, jnp.int32), window=window)
    assert out.dtype == q.dtype
    q, k, v, out = _numpy(q, k, v, out)
    for row, length in enumerate(lengths):
        visible = np.arange(length)[None] >= length - (window or length)
        _assert_attends(out[row], q[row], k[row, :length], v[row, :length], visible, dtype)


@pytest.mark.parametrize("pattern", [None, TriShape(np.array([64]), first=64, band=512, room=64)])
def test_causal_makes_no_square_array(pattern):
    """All temporaries of the compiled program together are smaller than an S x S array of single bytes."""
    length = 8192
    q = jax.ShapeDtypeStruct((1, length, 4, 8), jnp.float32)
    k = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    memory = _XLA.lower(q, k, k, lengths=lengths, pattern=pattern).compile().memory_analysis()
    assert memory.temp_size_in_bytes < length**2


def _asked(length: int = 8, dtype: str = "bfloat16", head_width: int = 16, *, traced: bool = False, tri: bool = False):
    """Shapes to trace an attention with: q, k, v, lengths, window, pattern."""
    q, k = (jax.ShapeDtypeStruct((1, length, heads, head_width), dtype) for heads in (4, 2))
    ones = jax.ShapeDtypeStruct((1,), jnp.int32)
    window = jax.ShapeDtypeStruct((), jnp.int32) if traced else None
    return q, k, k, ones, window, TriShape(ones, first=1, band=4, room=1) if tri else None


@pytest.mark.parametrize(
    ("module", "asked", "reason"),
    [
        (splash, _asked(traced=True), "this one is traced"),
        (splash, _asked(dtype="float16"), "not float16"),
        (splash, _asked(2**19), "bytes of scalar memory"),
        (cudnn, _asked(tri=True), "log-sum-exp in bfloat16"),
        (cudnn, _asked(traced=True), "this one is traced"),
        (cudnn, _asked(dtype="float32"), "not float32"),
        (cudnn, _asked(head_width=12), "not 12"),
        pytest.param(cudnn, _asked(), "cuDNN", marks=pytest.mark.skipif(_ON == "gpu", reason="cuDNN may be here")),
    ],
)
def test_an_implementation_tells_why_it_does_not_serve(module, asked, reason):
    def attend(q, k, v, lengths, window, pattern):
        return module.causal(q, k, v, lengths=lengths, window=window, pattern=pattern)

    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(attend, *asked)


def test_splash_serves_a_long_prompt_by_tri_shape():
    def attend(q, k, v, lengths, window, pattern):
        return splash.causal(q, k, v, lengths=lengths, window=window, pattern=pattern)

    q, *_ = asked = _asked(2**19, tri=True)
    assert jax.eval_shape(attend, *asked).shape == q.shape


@pytest.fixture
def on_tpu(monkeypatch):
    """The door as on a TPU, with the kernel interpreted."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(splash, "causal", functools.partial(splash.causal, interpret=True))
    attention._tell.cache_clear()


def test_the_first_that_serves_is_chosen_and_told_once(on_tpu, caplog):
    lengths = (60, 7)
    q, k, v = _random(lengths, 4, 2, "float32")
    given = {"lengths": jnp.asarray(lengths)}
    windowed = jax.jit(attention.causal)
    with caplog.at_level("DEBUG", logger="absl"):
        by_kernel = attention.causal(q, k, v, **given)
        attention.causal(q, k, v, **given)
        by_xla = windowed(q, k, v, **given, window=jnp.int32(2**30))
    for row, length in enumerate(lengths):
        given = _numpy(q[row, :length], k[row, :length], v[row, :length])
        for out in (by_kernel, by_xla):
            _assert_attends(np.asarray(out[row, :length]), *given, np.tri(length, dtype=bool), "float32")
    assert caplog.messages == [
        "attention: splash",
        "attention: xla",
        "attention: not splash: is compiled for one window, and this one is traced",
    ]


@pytest.mark.skipif(_ON != "cpu", reason="what is named here would serve")
def test_a_named_one_serves_or_says_why_not():
    q, k, v = _random((7,), 4, 2, "float32")
    for name, reason in (
        ("splash", "splash: runs on tpu"),
        ("cudnn", "cudnn: runs on gpu"),
        ("flash", "'flash' is unk"),
    ):
        with pytest.raises(UserError, match=reason):
            attention.causal(q, k, v, lengths=jnp.array([7]), implementation=name)


def test_all_reasons_are_told_together(monkeypatch):
    monkeypatch.setattr(attention, "_ORDER", {_ON: ("splash", "cudnn")})
    q, k, v = _random((7,), 4, 2, "float16")
    with pytest.raises(UserError, match=r"no attention serves: splash: .*; cudnn: .*"):
        attention.causal(q, k, v, lengths=jnp.array([7]))


@pytest.mark.skipif(_ON != "cpu", reason="what is named here would serve")
def test_a_model_keeps_to_the_attention_it_is_given():
    model = jax.tree.map(lambda p: p, tiny.decoder())
    model.attention_implementation = "cudnn"
    with pytest.raises(UserError, match="cudnn: runs on gpu, and this process has cpu"):
        jax.eval_shape(Decoder.hidden_states, model, jnp.zeros((1, 8), int), jnp.array([8]), 2)
    with pytest.raises(UserError, match="'splash' runs on tpu, and this process has cpu"):
        pipeline.load("no such model", attention="splash")


def test_a_kernel_does_not_run_on_prompts_that_are_cut(on_tpu):
    mesh = jax.sharding.AbstractMesh((1, 2, 1), ("data", "seq", "model"))
    with pytest.raises(UserError, match="'splash' reads whole prompts, which mesh data:1,seq:2,model:1 cuts"):
        pipeline.load("no such model", mesh=mesh, attention="splash")
