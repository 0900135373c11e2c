"""The Hopper kernels without a GPU: interpreted against a float64 reference, lowered, and compiled ahead of time."""

import functools
import math
import re
from types import SimpleNamespace

import bounds
import gpu_compiler
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64_scores import inputs, reference
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec
from real_shapes import HEADS, LENGTH, ROWS

from gemfilter_jax.errors import UserError
from gemfilter_jax.ops.key_scores import score_keys
from gemfilter_jax.pallas_kernels import gpu
from gemfilter_jax.parallel import collectives

_interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "force_gpu_interpret_mode"), reason=f"JAX {jax.__version__} has no Mosaic GPU interpreter"
)


def _masses(*args, from_sink: bool, window: int | None = None) -> jax.Array:
    return gpu.masses(*args, from_sink=from_sink, window=window, scale=args[0].shape[-1] ** -0.5, largest_exponent=60.0)


_jitted = jax.jit(_masses, static_argnames="from_sink")


def _bound(q, k) -> float:
    """Relative error of the scores of one prompt."""
    norms = (np.linalg.norm(np.asarray(x, np.float64), axis=-1).max() for x in (q, k))
    largest = math.prod(norms) * q.shape[-1] ** -0.5
    return bounds.of_scores(len(k), largest, q.shape[-1], *q.shape[:2])


def _assert_interpreted_equals_reference(q, rows, k, weights, *, from_sink: bool, window: int | None = None):
    with plgpu.force_gpu_interpret_mode():
        scores = np.asarray(_jitted(q, rows, k, weights, from_sink=from_sink, window=window))
    for row, got in enumerate(scores):
        want = reference(q[row], rows[row], k[row], weights, "sink" if from_sink else "softmax", window)
        assert got.shape == want.shape
        assert np.abs(got - want).max() / np.abs(want).max() < _bound(q[row], k[row])


@_interpreted
def test_weightings_give_the_scores_of_each_head_and_each_key_head():
    q, rows, k, _ = inputs((90,), 30, 6, 2, dtype=jnp.bfloat16)
    weights = np.concatenate([np.eye(6), np.repeat(np.eye(2), 3, axis=1)])
    _assert_interpreted_equals_reference(q, rows, k, weights, from_sink=False)


@_interpreted
def test_spans_of_several_blocks_that_do_not_divide_the_keys(monkeypatch):
    monkeypatch.setattr(gpu, "_THREAD_BLOCKS", 4)  # 2 key heads of 5 blocks: spans of 2, 2 and 1
    for from_sink in (False, True):
        _assert_interpreted_equals_reference(
            *inputs((290,), 5, 4, 2, width=32, dtype=jnp.bfloat16), from_sink=from_sink
        )


@pytest.mark.parametrize("from_sink", [False, True], ids=["softmax", "sink"])
@pytest.mark.parametrize("model", HEADS)
def test_lowered_for_cuda_without_an_array_of_rows_and_keys(model, from_sink):
    """No array but the keys has more than a value for each key and key head."""
    heads, groups, width = HEADS[model]
    keys = (1, LENGTH, groups, width)
    lowered = _lowered(heads, keys, from_sink=from_sink)
    assert lowered.count("custom_call @mosaic_gpu") == (1 if from_sink else 2)
    shapes = {tuple(map(int, shape.split("x"))) for shape in re.findall(r"tensor<([0-9x]+)x[a-z]+[0-9]+>", lowered)}
    assert {shape for shape in shapes if math.prod(shape) > groups * LENGTH} == {keys}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"rows": 1}, id="one row"),
        pytest.param({"weightings": (32,)}, id="each head"),
        pytest.param({"window": 4096}, id="sliding window"),
        pytest.param({"rows": 64}, id="a block of all rows"),
        pytest.param({"rows": 100}, id="most rows"),
        pytest.param({"dtype": jnp.float16}, id="float16"),
    ],
)
def test_variants_are_lowered(options):
    assert "custom_call @mosaic_gpu" in _lowered(32, (2, 1001, 8, 128), from_sink=False, **options)


@pytest.mark.parametrize("model", HEADS)
def test_compiled_for_an_h100_without_a_copy_of_the_keys(model):
    """Temporaries are a 25th of a float32 [H, W, S] array: scores of each key head, before they are summed."""
    heads, _, _ = HEADS[model]
    program = gpu_compiler.compiled(__file__, "sm_90")[model]
    assert program["kernels"] == 2
    assert program["temporaries"] < heads * ROWS * LENGTH * 4 / 25


def _lowered(heads: int, keys, *, from_sink: bool, window: int | None = None, **options) -> str:
    traced = _jitted.trace(*_shapes(heads, keys, **options), from_sink=from_sink, window=window)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def _shapes(heads: int, keys, *, rows=ROWS, dtype=jnp.bfloat16, weightings=(), sharding=None):
    """Those of the arguments of `masses`, for keys [B, S, G, E]."""
    batch, _, _, width = keys
    arguments = (
        ((batch, rows, heads, width), dtype),
        ((batch, rows), jnp.int32),
        (keys, dtype),
        ((*weightings, heads), jnp.float32),
    )
    return [jax.ShapeDtypeStruct(shape, of, sharding=sharding) for shape, of in arguments]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": np.float32}, "queries float32 and keys float32; both must be bfloat16 or both float16"),
        ({"width": 24}, "heads of 24; their width must be a multiple of 16"),
        ({"window": 600, "width": 128}, "1216 rows a key head and 1 weightings leave no room in shared memory"),
    ],
)
def test_what_the_kernels_cannot_serve_is_refused_with_the_reason(change, message):
    shape = {"lengths": (600,), "window": 4, "heads": 4, "groups": 2, "dtype": jnp.bfloat16} | change
    with pytest.raises(NotImplementedError, match=message):
        _masses(*inputs(**shape), from_sink=False)


@pytest.mark.parametrize(
    ("kind", "refused"),
    [("NVIDIA A100", "8.0"), ("NVIDIA B200", "10.0"), ("AMD MI300", "gfx942"), ("NVIDIA H100", None)],
)
def test_other_gpus_than_hopper_are_refused(monkeypatch, kind, refused):
    """Of the program's mesh, whatever the process's first device is."""
    capabilities = {"NVIDIA A100": "8.0", "NVIDIA H100": "9.0", "NVIDIA B200": "10.0", "AMD MI300": "gfx942"}
    present = [SimpleNamespace(device_kind=one, compute_capability=has) for one, has in capabilities.items()]
    monkeypatch.setattr(
        jax, "devices", lambda platform=None: present[::-1] if kind == "NVIDIA H100" else present[1:2] + present
    )
    mesh = jax.sharding.AbstractMesh(
        (1, 1, 1), ("data", "seq", "model"), abstract_device=jax.sharding.AbstractDevice(kind, None, "gpu")
    )
    given = inputs((40,), 4, 4, 2, dtype=jnp.bfloat16)
    call = collectives.shard_map(mesh, functools.partial(_masses, from_sink=False), (None,) * 4, PartitionSpec())
    if refused is None:
        assert jax.eval_shape(call, *given).shape == (1, 40)
    else:
        with pytest.raises(NotImplementedError, match=f"compute capability {re.escape(refused)}"):
            jax.eval_shape(call, *given)


def test_the_door_takes_xla_on_gpus_unless_the_kernel_is_asked_for(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    q, rows, k, weights = inputs((40,), 4, 4, 2)
    scores = score_keys(q, rows, k, head_weights=weights, normalisation="softmax")
    want = reference(q[0], rows[0], k[0], weights, "softmax")
    np.testing.assert_allclose(scores[0], want, rtol=_bound(q[0], k[0]))
    with pytest.raises(UserError, match=r"pallas: .*both must be bfloat16 or both float16"):
        score_keys(q, rows, k, head_weights=weights, normalisation="softmax", implementation="pallas")


def _programs() -> gpu_compiler.Programs:
    for model, (heads, groups, width) in HEADS.items():
        keys = (1, LENGTH, groups, width)

        def lowered(gpu, heads=heads, keys=keys):
            return _jitted.lower(*_shapes(heads, keys, sharding=gpu), from_sink=False)

        yield model, lowered


if __name__ == "__main__":
    gpu_compiler.main(_programs())
