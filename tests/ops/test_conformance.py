"""Every implementation of attention and of key scores against one float64 reference each.

A new implementation is one row of `_ATTENTION` or `_KEY_SCORES`, a new circumstance one row of the cases.
"""

import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import float64_scores
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_case import Attention
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from gemfilter_jax.ops import attention
from gemfilter_jax.ops.attention import cudnn, pallas, splash, xla
from gemfilter_jax.ops.key_scores import score_keys
from gemfilter_jax.pallas_kernels import gpu, gpu_attention
from gemfilter_jax.parallel import collectives, shards

_ON = jax.default_backend()
_SEQ = 4  # devices that the sharded implementation runs on


_ATTENTION_CASES = {
    "one token": Attention((1,)),
    "less than a block": Attention((37,)),
    "one block": Attention((128,)),
    "padding, not a multiple of the block": Attention((301, 129, 128, 1)),
    "large logits": Attention(large=True),
    "one key head": Attention((150, 40), groups=1),
    "a key head for each query head": Attention((150, 40), heads=3, groups=3),
    "heads of 96": Attention((150, 7), width=96),
    "bfloat16": Attention((301, 129, 128, 1), dtype="bfloat16"),
    "bfloat16, one key head, heads of 64": Attention((150, 40), groups=1, width=64, dtype="bfloat16"),
    "bfloat16, window": Attention((301, 129, 1), dtype="bfloat16", window=25),
    "bfloat16, window wider than the prompt": Attention((150, 40), dtype="bfloat16", window=2**30),
    "bfloat16, scale": Attention((150, 40), dtype="bfloat16", scale=0.5),
    "bfloat16, soft cap and window": Attention((301, 129, 1), dtype="bfloat16", window=60, soft_cap=2.0),
    "window of one": Attention(window=1),
    "window within a block": Attention(window=25),
    "window of a block": Attention(window=128),
    "window over a block's edge": Attention(window=129),
    "window of two blocks": Attention(window=257),
    "window wider than the prompt": Attention(window=2**30),
    "scale": Attention(scale=0.3),
    "soft cap": Attention(soft_cap=1.5),
    "soft cap, scale and window": Attention(window=60, soft_cap=2.0, scale=0.6),
    "gaps": Attention(gaps=True),
    "gaps, window": Attention(window=60, gaps=True),
    "gaps, window over blocks": Attention(window=600, gaps=True, heads=3, groups=1),
    "tri_shape": Attention((301, 175, 8), tails=(16, 12, 8), first=16, band=128, room=16),
    "tri_shape, window": Attention((301, 175, 8), tails=(16, 12, 8), first=16, band=128, room=16, window=75),
    "tri_shape, window within the band": Attention((301, 175), tails=(16, 12), first=16, band=128, room=16, window=15),
    "tri_shape, band alone": Attention((301, 175, 8), tails=(0, 0, 0), band=25),
    "tri_shape, wide start": Attention((301, 175, 8), tails=(1, 0, 2), first=75, band=1, room=2),
    "tri_shape, long tails": Attention((301, 175, 8), tails=(50, 83, 8), first=5, band=175, room=83),
    "tri_shape, wider than the prompt": Attention((301, 175), tails=(800, 800), first=800, band=800, room=800),
    "tri_shape, soft cap and scale": Attention(
        (301, 175), tails=(16, 12), first=16, band=64, room=16, soft_cap=2.0, scale=0.6
    ),
    "bfloat16, tri_shape": Attention(
        (301, 175, 8), tails=(16, 12, 8), first=16, band=100, room=16, dtype="bfloat16", heads=6
    ),
    "bfloat16, tri_shape, heads of 96": Attention(
        (301, 40), tails=(9, 0), first=70, band=45, room=16, dtype="bfloat16", width=96
    ),
    "bfloat16, tri_shape, window": Attention(
        (301, 175, 8), tails=(16, 12, 8), first=100, band=60, room=16, window=190, dtype="bfloat16"
    ),
    "bfloat16, tri_shape, window within the band": Attention(
        (301, 175), tails=(16, 12), first=16, band=100, room=16, window=15, dtype="bfloat16"
    ),
    "bfloat16, tri_shape, band alone": Attention((301, 175, 8), tails=(0, 0, 0), band=25, dtype="bfloat16"),
    "bfloat16, tri_shape, long tails, soft cap and scale": Attention(
        (301, 175, 8), tails=(150, 83, 8), first=5, band=64, room=150, soft_cap=2.0, scale=0.5, dtype="bfloat16"
    ),
    "bfloat16, tri_shape, wider than the prompt": Attention(
        (301, 175), tails=(800, 800), first=800, band=800, room=800, dtype="bfloat16"
    ),
    "tri_shape, gaps, window": Attention((301,), tails=(16,), first=16, band=64, room=16, window=75, gaps=True),
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 128, so that short prompts have several."""
    for module, name in ((xla, "_BLOCK"), (xla, "_BAND_BLOCK"), (splash, "_BLOCK")):
        monkeypatch.setattr(module, name, 128)
    monkeypatch.setattr(gpu_attention, "_QUERIES", 64)
    monkeypatch.setattr(gpu_attention, "_KEYS", 32)


def _asked(case: Attention, positions: np.ndarray) -> dict[str, Any]:
    return {
        "lengths": jnp.asarray(case.lengths, jnp.int32),
        "pattern": case.pattern,
        "positions": jnp.asarray(positions) if case.gaps else None,
        "scale": case.scale,
        "soft_cap": case.soft_cap,
    }


def _all_slots(case: Attention) -> np.ndarray:
    return np.broadcast_to(np.arange(max(case.lengths)), (len(case.lengths), max(case.lengths)))


def _of_prompt(implementation: Callable[..., jax.Array], case: Attention) -> tuple[jax.Array, np.ndarray]:
    q, k, v, positions = case.inputs()
    asked = _asked(case, positions) | {"window": case.window}
    asked["scale"] = case.width**-0.5 if case.scale is None else case.scale
    return jax.jit(lambda q, k, v: implementation(q, k, v, **asked))(q, k, v), _all_slots(case)


def _xla(case: Attention) -> tuple[jax.Array, np.ndarray]:
    """With a window that is traced."""
    q, k, v, positions = case.inputs()
    asked = _asked(case, positions) | {"implementation": "xla"}
    call = jax.jit(lambda q, k, v, window: attention.causal(q, k, v, window=window, **asked))
    return call(q, k, v, case.window), _all_slots(case)


def _cudnn(case: Attention) -> tuple[jax.Array, np.ndarray]:
    """Where there is no GPU, what cuDNN is asked for is computed by XLA."""
    by_cudnn = jax.nn.dot_product_attention

    def by_xla(*qkv, **asked):
        return by_cudnn(*qkv, **asked | {"implementation": "xla"})

    with pytest.MonkeyPatch.context() as patch:
        if _ON != "gpu":
            patch.setattr(jax.nn, "dot_product_attention", by_xla)
        return _of_prompt(cudnn.causal, case)


def _pallas(case: Attention) -> tuple[jax.Array, np.ndarray]:
    """With a window that is traced; interpreted where there is no GPU."""
    q, k, v, positions = case.inputs()
    asked = _asked(case, positions) | {"scale": case.width**-0.5 if case.scale is None else case.scale}
    attend = functools.partial(pallas.causal, **asked, interpret=_ON != "gpu")
    return jax.jit(lambda q, k, v, window: attend(q, k, v, window=window))(q, k, v, case.window), _all_slots(case)


def _sharded(case: Attention) -> tuple[jax.Array, np.ndarray]:
    """By name from the process of `_SEQ` devices."""
    name = next(name for name, one in _ATTENTION_CASES.items() if one == case)
    found = _of_devices()[name]
    if found.dtype.kind == "U":
        raise NotImplementedError(str(found))
    return jnp.asarray(found, case.dtype), _all_slots(case)


@functools.cache
def _of_devices() -> dict[str, np.ndarray]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={_SEQ}",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    file = os.path.join(os.environ["PYTEST_SHARDED"], "sharded.npz")
    done = subprocess.run(
        [sys.executable, __file__, file], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(np.load(file))


def _run_sharded(case: Attention) -> np.ndarray:
    """Attention of prompts that are sharded over `_SEQ` devices, or why it is refused."""
    mesh = jax.make_mesh((1, _SEQ, 1), ("data", "seq", "model"), (jax.sharding.AxisType.Auto,) * 3)
    q, k, v, positions = case.inputs()
    cut = shards.SequenceShards(_SEQ, mirrored=case.pattern is None)
    length = q.shape[1]
    order = cut.order(cut.padded(length))
    q, k, v = (jnp.pad(x, ((0, 0), (0, len(order) - length), (0, 0), (0, 0)))[:, order] for x in (q, k, v))
    call = functools.partial(attention.causal, window=case.window, **_asked(case, positions))
    over_seq = PartitionSpec(None, "seq")
    try:
        out = jax.jit(collectives.shard_map(mesh, call, (over_seq,) * 3, over_seq))(q, k, v)
    except Exception as error:  # the reason is what the test looks at
        return np.asarray(str(error))
    return np.asarray(out.astype(jnp.float32))[:, np.argsort(order)][:, :length]


def _last_slots(case: Attention, count: int) -> np.ndarray:
    return np.asarray(case.lengths)[:, None] - count + np.arange(count)


def _rows(case: Attention, *, by_position: bool) -> tuple[jax.Array, np.ndarray]:
    """The last seven rows, some of which stand before a short prompt."""
    q, k, v, positions = case.inputs()
    slots = _last_slots(case, 7)
    own = np.where(slots >= 0, np.take_along_axis(positions, slots.clip(0), axis=1), -1)
    q = jnp.take_along_axis(q, jnp.asarray(slots.clip(0))[..., None, None], axis=1)
    held = np.where(_all_slots(case) < np.asarray(case.lengths)[:, None], positions, -1)
    asked = {"window": case.window, "scale": case.scale, "soft_cap": case.soft_cap}
    asked["key_positions"] = jnp.asarray(held) if by_position else None
    return jax.jit(lambda *given: attention.rows(*given, **asked))(q, jnp.asarray(own), k, v), slots


def _to_cache(case: Attention, *, by_head: bool) -> tuple[jax.Array, np.ndarray]:
    """The last row, to a cache in no order and with holes, for all key heads the same or each its own."""
    q, k, v, positions = case.inputs()
    slots, rng = _last_slots(case, 1), np.random.default_rng(1)
    length = positions.shape[1]
    orders = [rng.permutation(length + 5) for _ in range(case.groups if by_head else 1)]
    held = np.where(np.arange(length) < np.asarray(case.lengths)[:, None], positions, -1)
    held = np.pad(held, ((0, 0), (0, 5)), constant_values=-1)

    def cached(x):
        x = jnp.pad(x, ((0, 0), (0, 5), (0, 0), (0, 0)), constant_values=1e4)
        by_group = [x[:, orders[group % len(orders)], group] for group in range(case.groups)]
        return jnp.stack(by_group, axis=2)

    key_positions = np.stack([held[:, order] for order in orders], axis=1)
    own = np.take_along_axis(positions, slots, axis=1)[:, 0]
    q = jnp.take_along_axis(q, jnp.asarray(slots)[..., None, None], axis=1)
    asked = {"window": case.window, "scale": case.scale, "soft_cap": case.soft_cap}
    asked["key_positions"] = jnp.asarray(key_positions if by_head else key_positions[:, 0])
    return jax.jit(lambda *given: attention.to_cache(*given, **asked))(q, jnp.asarray(own), cached(k), cached(v)), slots


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A row of the suite.

    Attributes:
      run: the result for a case, and what of the reference it is compared with.
      refused: a reason that it must refuse a case with, None for one that it must serve.
      asked: whether it can be asked for a case at all.
      rarely: whether the exhaustive tests alone ask it, because other cases or implementations show the same.
    """

    run: Callable[[Any], Any]
    refused: Callable[[Any], str | None] = lambda case: None
    asked: Callable[[Any], bool] = lambda case: True
    rarely: Callable[[Any], bool] = lambda case: False


def _needs_own_kernel(case: Attention) -> bool:
    """On a GPU, since cuDNN refuses it."""
    return case.dtype == "bfloat16" and (case.pattern is not None or case.soft_cap is not None)


def _refused_by_cudnn(case: Attention) -> str | None:
    if case.pattern is not None:
        return "log-sum-exp"
    if case.soft_cap is not None:
        return "no soft cap"
    if case.windows_by_position:
        return "by slots"
    return "not float32" if case.dtype == "float32" else None


def _refused_by_pallas(case: Attention) -> str | None:
    if case.windows_by_position:
        return "by slots"
    return "not float32" if case.dtype == "float32" else None


_ATTENTION = {
    "xla": Implementation(
        _xla,
        lambda case: "by slots" if case.pattern and case.windows_by_position else None,
        rarely=_needs_own_kernel,
    ),
    "splash": Implementation(
        functools.partial(_of_prompt, functools.partial(splash.causal, interpret=_ON != "tpu")),
        lambda case: "by slots" if case.windows_by_position else None,
        rarely=_needs_own_kernel,
    ),
    "cudnn": Implementation(_cudnn, _refused_by_cudnn),
    "pallas": Implementation(
        _pallas, _refused_by_pallas, rarely=lambda case: case.dtype == "bfloat16" and not _needs_own_kernel(case)
    ),
    "sharded": Implementation(
        _sharded,
        lambda case: "by slots" if case.windows_by_position else None,
        lambda case: case.dtype == "float32" and case.width == 16 and case.window in (None, 60, 75, 257),
    ),
    "rows": Implementation(
        functools.partial(_rows, by_position=False),
        asked=lambda case: case.pattern is None and not case.gaps,
    ),
    "rows by position": Implementation(
        functools.partial(_rows, by_position=True), asked=lambda case: case.pattern is None
    ),
    "to_cache": Implementation(functools.partial(_to_cache, by_head=False), asked=lambda case: case.pattern is None),
    "to_cache by head": Implementation(
        functools.partial(_to_cache, by_head=True), asked=lambda case: case.pattern is None
    ),
}


def _pairs(implementations: dict[str, Implementation], cases: dict[str, Any]) -> Sequence[Any]:
    return [
        pytest.param(
            name, case, id=f"{name}, {case}", marks=[pytest.mark.exhaustive] if one.rarely(cases[case]) else []
        )
        for name, one in implementations.items()
        for case in cases
        if one.asked(cases[case])
    ]


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory):
    """Where the process of several devices leaves its results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTEST_SHARDED", str(tmp_path_factory.mktemp("sharded")))
        yield


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("implementation", "case"), _pairs(_ATTENTION, _ATTENTION_CASES))
def test_attention(implementation, case):
    row, asked = _ATTENTION[implementation], _ATTENTION_CASES[case]
    if reason := row.refused(asked):
        with pytest.raises(Exception, match=reason):
            row.run(asked)
    else:
        asked.check(*row.run(asked))


@dataclasses.dataclass(frozen=True)
class KeyScores:
    """One circumstance that key scores are computed in; all in a batch, rows before a prompt's start do not count."""

    lengths: tuple[int, ...]
    observed: int
    heads: int = 4
    groups: int = 2
    width: int = 16
    dtype: Any = np.float32
    window: int | None = None
    scale: float | None = None
    normalisation: str = "softmax"
    each_head: bool = False

    def inputs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        given = float64_scores.inputs(self.lengths, self.observed, self.heads, self.groups, self.width, self.dtype)
        each = np.concatenate([np.eye(self.heads), np.repeat(np.eye(self.groups), self.heads // self.groups, axis=1)])
        return (*given[:3], each.astype(np.float32) if self.each_head else given[3])

    def check(self, scores: jax.Array) -> None:
        q, rows, k, weights = self.inputs()
        for row in range(len(self.lengths)):
            given = (q[row], rows[row], k[row], weights, self.normalisation, self.window, self.scale)
            error = np.abs(np.asarray(scores[row]) - float64_scores.reference(*given))
            assert (error <= float64_scores.largest_error(*given)).all()


_KEY_SCORES_SHAPES = {
    "the last row alone": KeyScores((70, 17), 1),
    "prompts shorter than the observed rows": KeyScores((70, 33, 20, 1), 32),
    "one key": KeyScores((1,), 1),
    "several blocks of keys, the last one short": KeyScores((1500, 1024, 1025), 32),
    "one key head": KeyScores((100,), 8, groups=1),
    "a key head for each query head": KeyScores((100,), 8, heads=3, groups=3, width=96),
    "a window within a block": KeyScores((2100, 30), 8, window=20),
    "a window over a block's edge": KeyScores((2100, 1030), 8, window=1040),
    "scale": KeyScores((100, 20), 8, scale=0.6),
    "each head and each key head": KeyScores((60,), 8, heads=6, each_head=True),
    "bfloat16": KeyScores((300, 90), 32, width=64, dtype=jnp.bfloat16),
    "bfloat16, one key": KeyScores((1,), 1, dtype=jnp.bfloat16),
    "bfloat16, the last row alone, one key head": KeyScores((70, 17), 1, groups=1, dtype=jnp.bfloat16),
    "bfloat16, prompts shorter than the observed rows": KeyScores((150, 33, 20, 1), 32, heads=6, dtype=jnp.bfloat16),
    "bfloat16, window within a block, heads of 96": KeyScores(
        (300, 30), 8, heads=3, groups=3, width=96, window=20, dtype=jnp.bfloat16
    ),
    "bfloat16, window": KeyScores((300, 130), 8, window=80, dtype=jnp.bfloat16),
    "bfloat16, scale": KeyScores((100, 20), 8, scale=0.6, dtype=jnp.bfloat16),
    "float16": KeyScores((100,), 8, heads=2, groups=1, width=128, dtype=np.float16),
}
_KEY_SCORES_CASES = {
    f"{normalisation}, {name}": dataclasses.replace(case, normalisation=normalisation)
    for normalisation in ("none", "softmax", "sink")
    for name, case in _KEY_SCORES_SHAPES.items()
}


def _scores(implementation: str, simulated: Callable[[], contextlib.AbstractContextManager], case: KeyScores):
    asked = {"normalisation": case.normalisation, "scale": case.scale, "implementation": implementation}
    q, rows, k, weights = case.inputs()
    call = jax.jit(lambda q, rows, k, window: score_keys(q, rows, k, head_weights=weights, window=window, **asked))
    with simulated():
        return (call(q, rows, k, case.window).block_until_ready(),)


def _on_a_simulated_gpu(case: KeyScores):
    q, rows, k, weights = case.inputs()
    asked = {"from_sink": case.normalisation == "sink", "window": case.window, "largest_exponent": 60.0}
    asked["scale"] = case.width**-0.5 if case.scale is None else case.scale
    call = jax.jit(lambda q, rows, k, weights: gpu.masses(q, rows, k, weights, **asked))
    if k.dtype == np.float32:
        return (call(q, rows, k, weights),)
    if not hasattr(plgpu, "force_gpu_interpret_mode"):
        pytest.skip(f"JAX {jax.__version__} has no Mosaic GPU interpreter")
    with plgpu.force_gpu_interpret_mode():
        return (call(q, rows, k, weights).block_until_ready(),)


_KEY_SCORES = {
    "xla": Implementation(functools.partial(_scores, "xla", contextlib.nullcontext)),
    # On a simulated TPU, whose fresh memory holds NaN; "none" has no kernel.
    "tpu": Implementation(
        functools.partial(_scores, "pallas", pltpu.force_tpu_interpret_mode),
        lambda case: "keys float16" if case.dtype == np.float16 and case.normalisation != "none" else None,
    ),
    "gpu": Implementation(
        _on_a_simulated_gpu,
        lambda case: "keys float32" if case.dtype == np.float32 else None,
        lambda case: case.normalisation != "none",
    ),
}


@pytest.mark.parametrize(("implementation", "case"), _pairs(_KEY_SCORES, _KEY_SCORES_CASES))
def test_key_scores(implementation, case):
    row, asked = _KEY_SCORES[implementation], _KEY_SCORES_CASES[case]
    if reason := row.refused(asked):
        with pytest.raises(Exception, match=reason):
            row.run(asked)
    else:
        asked.check(*row.run(asked))


if __name__ == "__main__":
    asked = {name: case for name, case in _ATTENTION_CASES.items() if _ATTENTION["sharded"].asked(case)}
    np.savez(sys.argv[1], **{name: _run_sharded(case) for name, case in asked.items()})
