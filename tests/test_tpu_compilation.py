"""Kernels compiled ahead of time for TPU chips that this machine does not have, by libtpu in a process of its own."""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from gemfilter_jax.scoring import score_keys, score_keys_by_all_rows

_LENGTH, _ROWS = 131072, 32
_HEADS = {  # query heads, key heads, head width
    "Llama-3.1-8B": (32, 8, 128),
    "Phi-3.5-mini": (32, 32, 96),
    "Qwen2.5-7B": (28, 4, 128),
    "SmolLM2-135M": (9, 3, 64),
}
_ACCELERATORS = {"v5e:2x2": "v5litepod-4", "v6e:2x2": "v6e-4"}


@functools.cache
def _compiled(topology: str) -> dict[str, dict[str, int]]:
    """Bytes of each program on one chip, by the program's name."""
    spec = importlib.util.find_spec("libtpu")
    if spec is None or spec.origin is None:
        pytest.skip("libtpu is not installed (pip install libtpu); it compiles for TPU on any Linux machine")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_ACCELERATOR_TYPE": _ACCELERATORS[topology],
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    command = [sys.executable, __file__, topology]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("topology", _ACCELERATORS)
@pytest.mark.parametrize("normalisation", ["softmax", "sink"])
@pytest.mark.parametrize("model", _HEADS)
def test_scores_need_next_to_no_memory(model, normalisation, topology):
    """No copy of the keys, and a 1,000th of a float32 [H, W, S] array."""
    program = _compiled(topology)[f"{model} {normalisation}"]
    assert program["temporaries"] < _HEADS[model][0] * _ROWS * _LENGTH * 4 / 1000


@pytest.mark.parametrize("topology", _ACCELERATORS)
@pytest.mark.parametrize("variant", ["float32", "one row", "each head", "sliding window", "all rows"])
def test_variants_compile(variant, topology):
    assert _compiled(topology)[variant]["temporaries"] < 2**27


def _programs():
    """Name, function, and shapes and dtypes of q, rows (or lengths), keys [B, G, E, S] and head weights."""

    def arguments(heads, groups, width, rows=_ROWS, length=_LENGTH, dtype=jnp.bfloat16, weightings=()):
        q, k = ((1, rows, heads, width), dtype), ((1, groups, width, length), dtype)
        return q, ((1, rows), jnp.int32), k, ((*weightings, heads), jnp.float32)

    def scores(q, rows, k, head_weights, door=score_keys, normalisation="softmax", **options):
        k = k.transpose(0, 3, 1, 2)  # as XLA lays out what rotary writes
        return door(
            q, rows, k, head_weights=head_weights, normalisation=normalisation, implementation="pallas", **options
        )

    for model, shape in _HEADS.items():
        for normalisation in ("softmax", "sink"):
            named = functools.partial(scores, normalisation=normalisation)
            yield f"{model} {normalisation}", named, arguments(*shape)
    llama = _HEADS["Llama-3.1-8B"]
    yield "float32", scores, arguments(*llama, dtype=jnp.float32)
    yield "one row", scores, arguments(*llama, rows=1)
    yield "each head", scores, arguments(*llama, weightings=(llama[0],))
    yield "sliding window", functools.partial(scores, window=4096), arguments(*llama)
    q, (_, integer), k, weights = arguments(*llama, rows=16000, length=16000)
    yield "all rows", functools.partial(scores, door=score_keys_by_all_rows), (q, ((1,), integer), k, weights)


def _main(topology: str) -> None:
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    chip = jax.sharding.SingleDeviceSharding(device)
    compiled = {}
    for name, function, arguments in _programs():
        shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=chip) for shape, dtype in arguments]
        memory = jax.jit(function).lower(*shapes).compile().memory_analysis()
        compiled[name] = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
    print(json.dumps(compiled))


if __name__ == "__main__":
    _main(sys.argv[1])
