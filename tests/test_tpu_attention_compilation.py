"""Splash attention compiled for TPU, without one: libtpu's compiler, in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("needs libtpu: pip install -e '.[tpu]'", allow_module_level=True)

_LENGTH = 131072
_SHAPES = {"Llama-3.1-8B": (32, 8, 128), "Phi-3.5": (32, 32, 96)}
_TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_COMPILE = """
import json, sys
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from gemfilter_jax.attention import TriShape, splash

topology, dtype, length, *shapes = json.loads(sys.argv[1])
device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
one = jax.sharding.SingleDeviceSharding(device)
abstract = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=one)
lengths = abstract(1, dtype="int32")
patterns = None, TriShape(abstract(1, dtype="int32"), first=64, band=512, room=64)
for heads, groups, width in shapes:
    q, k = (abstract(1, length, count, width, dtype=dtype) for count in (heads, groups))
    for window, pattern in (None, patterns[0]), (2047, patterns[0]), (None, patterns[1]):
        attend = lambda q, k, v, lengths, pattern: splash.causal(
            q, k, v, lengths=lengths, window=window, pattern=pattern
        )
        compiled = jax.jit(attend).lower(q, k, k, lengths, pattern).compile()
        memory, text = compiled.memory_analysis(), compiled.as_text()
        print(json.dumps([memory.temp_size_in_bytes, memory.argument_size_in_bytes, "splash" in text]))
"""


def _compile(topology: str, dtype: str, length: int, *shapes: tuple[int, int, int]) -> list[tuple[int, int, bool]]:
    """Bytes of temporaries and arguments, and whether the kernel is there: dense, windowed and tri_shape per shape."""
    given = json.dumps([topology, dtype, length, *shapes])
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE, given], env=os.environ | _TPU, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("model", _SHAPES)
def test_it_makes_no_square_array(model, topology):
    """All temporaries together are smaller than an S x S array of single bytes, for one head."""
    heads, groups, width = _SHAPES[model]
    compiled = _compile(topology, "bfloat16", _LENGTH, _SHAPES[model])
    assert len(compiled) == 3
    for temporaries, arguments, has_kernel in compiled:
        assert has_kernel
        assert arguments >= _LENGTH * (heads + 2 * groups) * width * 2
        assert temporaries < _LENGTH**2


def test_it_takes_float32_and_narrow_heads():
    assert all(has_kernel for *_, has_kernel in _compile("v5e:2x2", "float32", 8192, (9, 3, 64)))
