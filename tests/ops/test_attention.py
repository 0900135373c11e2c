"""Which implementation of attention serves, and proof that XLA's makes no S x S array."""

import functools
import math
import sys
from collections.abc import Callable
from types import SimpleNamespace

import bounds
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec
from model_outputs import hidden_states

from gemfilter_jax import pallas_kernels, pipeline
from gemfilter_jax.errors import UserError
from gemfilter_jax.ops import attention, dispatch
from gemfilter_jax.ops.attention import TriShape, cudnn, pallas, splash
from gemfilter_jax.parallel import collectives

_ON = jax.default_backend()
_XLA = jax.jit(functools.partial(attention.causal, implementation="xla"))


_PLAIN = {"positions": None, "scale": 0.25, "soft_cap": None}


def _random(lengths: tuple[int, ...], heads: int, groups: int, dtype: str):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(len(lengths), max(lengths), heads, 16))
    k, v = rng.normal(size=(2, len(lengths), max(lengths), groups, 16))
    return [jnp.asarray(x, dtype) for x in (q, k, v)]


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
        (pallas, _asked(dtype="float32"), "not float32"),
        (pallas, _asked(head_width=257), "not 257"),
        pytest.param(cudnn, _asked(), "cuDNN", marks=pytest.mark.skipif(_ON == "gpu", reason="cuDNN may be here")),
    ],
)
def test_an_implementation_tells_why_it_does_not_serve(module, asked, reason):
    def attend(q, k, v, lengths, window, pattern):
        return module.causal(q, k, v, lengths=lengths, window=window, pattern=pattern, **_PLAIN)

    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(attend, *asked)


def test_splash_serves_a_long_prompt_by_tri_shape():
    def attend(q, k, v, lengths, window, pattern):
        return splash.causal(q, k, v, lengths=lengths, window=window, pattern=pattern, **_PLAIN)

    q, *_ = asked = _asked(2**19, tri=True)
    assert jax.eval_shape(attend, *asked).shape == q.shape


@pytest.fixture
def on_tpu(monkeypatch):
    """The door as on a TPU, with the kernel interpreted."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(splash, "causal", functools.partial(splash.causal, interpret=True))
    dispatch.log_once.cache_clear()


def test_the_first_that_serves_is_chosen_and_told_once(on_tpu, caplog):
    lengths = (60, 7)
    q, k, v = _random(lengths, 4, 2, "float32")
    given = {"lengths": jnp.asarray(lengths)}
    windowed = jax.jit(attention.causal)
    with caplog.at_level("DEBUG", logger="absl"):
        by_kernel = attention.causal(q, k, v, **given)
        attention.causal(q, k, v, **given)
        by_xla = windowed(q, k, v, **given, window=jnp.int32(2**30))
    norms = (np.linalg.norm(np.asarray(x), axis=-1).max() for x in (q, k))
    relative = bounds.of_attention(np.array(max(lengths)), math.prod(norms) * q.shape[-1] ** -0.5, q.shape[-1])
    assert np.abs(by_kernel - by_xla).max() < 2 * relative * np.abs(v).max()
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
    order = {_ON: ("splash", "cudnn")}
    monkeypatch.setattr(attention, "_DISPATCHER", dispatch.Dispatcher("attention", attention.IMPLEMENTATIONS, order))
    q, k, v = _random((7,), 4, 2, "float32" if _ON == "gpu" else "float16")
    with pytest.raises(UserError, match=r"no implementation of attention serves: splash: .*; cudnn: .*"):
        attention.causal(q, k, v, lengths=jnp.array([7]))


def _traced_on(kind: str, call: Callable[[], object]) -> None:
    """Trace a call inside a program for a mesh of GPUs of a kind."""
    gpu = jax.sharding.AbstractDevice(kind, None, "gpu")
    mesh = jax.sharding.AbstractMesh((1, 1, 1), ("data", "seq", "model"), abstract_device=gpu)

    def program(x):
        call()
        return x

    jax.eval_shape(collectives.shard_map(mesh, program, (None,), PartitionSpec()), jnp.zeros(1))


@pytest.mark.parametrize(("size", "lengths"), [(5, [3]), (512, [512]), (1300, [512, 1299]), (1300, [1, 1024, 1300])])
def test_cudnn_leaves_zeros_in_padding_and_all_else_as_it_is(size, lengths):
    """Whatever lies there, NaN too."""
    rng, real = np.random.default_rng(0), np.arange(size) < np.array(lengths)[:, None]
    x = np.where(real[..., None, None], rng.normal(size=(len(lengths), size, 2, 4)), np.nan).astype(np.float32)
    cleared = jax.jit(cudnn.without_padding)(x, jnp.array(lengths))
    np.testing.assert_array_equal(cleared, np.where(real[..., None, None], x, 0))


@pytest.mark.parametrize(
    ("kind", "refused"),
    [("NVIDIA A100", False), ("Tesla V100", True), ("AMD MI300", True), ("NVIDIA unheard-of", False)],
)
def test_cudnn_asks_the_device_of_the_program_not_the_process(monkeypatch, kind, refused):
    """A process's first device may be another than that of the mesh; a kind that it lacks counts as capable."""
    capabilities = {"Tesla P100": "6.0", "NVIDIA A100": "8.0", "Tesla V100": "7.0", "AMD MI300": "gfx942"}
    present = [SimpleNamespace(device_kind=one, compute_capability=has) for one, has in capabilities.items()]
    monkeypatch.setattr(jax, "devices", lambda platform=None: present)
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, *_, **asked: q)
    q, k, v = _random((7,), 4, 2, "bfloat16")

    def attend():
        attention.causal(q, k, v, lengths=jnp.array([7]), implementation="cudnn")

    if refused:
        with pytest.raises(UserError, match=f"cudnn: needs compute capability 8.0, .* has {capabilities[kind]}"):
            _traced_on(kind, attend)
    else:
        _traced_on(kind, attend)


@pytest.mark.skipif(_ON != "cpu", reason="kernels would run on the GPU")
def test_a_gpu_takes_its_own_kernel_for_what_cudnn_refuses(monkeypatch, caplog):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(pallas, "causal", functools.partial(pallas.causal, interpret=True))
    dispatch.log_once.cache_clear()
    lengths = (60, 7)
    q, k, v = _random(lengths, 4, 2, "bfloat16")
    pattern = TriShape(jnp.array([5, 2]), first=4, band=16, room=5)
    with caplog.at_level("DEBUG", logger="absl"):
        attention.causal(q, k, v, lengths=jnp.asarray(lengths), pattern=pattern)
    assert caplog.messages[0] == "attention: pallas"
    assert caplog.messages[1].startswith("attention: not cudnn: gives its log-sum-exp in bfloat16")


@pytest.mark.skipif(_ON != "cpu", reason="the kernel would run on the GPU")
def test_without_triton_the_gpu_kernel_refuses(monkeypatch):
    monkeypatch.setitem(sys.modules, "gemfilter_jax.pallas_kernels.gpu_attention", None)
    monkeypatch.delattr(pallas_kernels, "gpu_attention", raising=False)
    q, k, v = _random((7,), 4, 2, "bfloat16")
    with pytest.raises(NotImplementedError, match="has no Triton lowering of Pallas"):
        pallas.causal(q, k, v, lengths=jnp.array([7]), window=None, pattern=None, **_PLAIN)


@pytest.mark.skipif(_ON != "cpu", reason="what is named here would serve")
def test_a_model_keeps_to_the_attention_it_is_given():
    model = jax.tree.map(lambda p: p, tiny.decoder())
    model.attention_implementation = "cudnn"
    with pytest.raises(UserError, match="cudnn: runs on gpu, and this process has cpu"):
        jax.eval_shape(hidden_states, model, jnp.zeros((1, 8), int), jnp.array([8]), 2)
    with pytest.raises(UserError, match="'splash' runs on tpu, and this process has cpu"):
        pipeline.load("no such model", attention="splash")


def test_a_kernel_does_not_run_on_prompts_that_are_cut(on_tpu):
    mesh = jax.sharding.AbstractMesh((1, 2, 1), ("data", "seq", "model"))
    with pytest.raises(UserError, match="'splash' reads whole prompts, which mesh data:1,seq:2,model:1 cuts"):
        pipeline.load("no such model", mesh=mesh, attention="splash")
