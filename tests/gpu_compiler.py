"""Programs compiled for GPUs that this machine does not have: JAX's CUDA plugin, in a process of its own."""

import functools
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import hlo_traffic
import jax
import pytest
from flax import nnx
from jax.experimental import topologies

from gemfilter_jax.models.layer import replaced
from gemfilter_jax.models.transformer import Decoder

_GPU = """
    platform_name: "CUDA" device_description_str: "{name}" dnn_version_info {{ major: 9 minor: 8 }}
    gpu_device_info {{
        cuda_compute_capability {{ major: {major} }} core_count: {cores} fpus_per_core: {units} threads_per_warp: 32
        threads_per_block_limit: 1024 threads_per_core_limit: 2048
        registers_per_block_limit: 65536 registers_per_core_limit: 65536
        shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared} shared_memory_per_core: {shared_of_core}
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock} device_memory_size: {memory}
    }}
"""
_A100 = {"name": "NVIDIA A100", "major": 8, "cores": 108, "units": 64, "shared": 166912, "shared_of_core": 167936} | {
    "bandwidth": 2_039_000_000_000, "cache": 41943040, "clock": 1.41, "memory": 80 * 2**30
}  # fmt: skip
_H100 = {"name": "NVIDIA H100", "major": 9, "cores": 132, "units": 128, "shared": 232448, "shared_of_core": 233472} | {
    "bandwidth": 3_352_000_000_000, "cache": 52428800, "clock": 1.98, "memory": 80 * 2**30
}  # fmt: skip
_TARGETS = {"sm_80": _A100, "sm_90": _H100}
every_target = pytest.mark.parametrize("target", _TARGETS)

Programs = Iterator[tuple[str, Callable[[jax.sharding.Sharding], jax.stages.Lowered]]]
"""Name, and what lowers the program for one GPU."""


@functools.cache
def compiled(file: str, target: str) -> dict[str, dict[str, int]]:
    """What `main` makes of the programs of a test file, by the program's name; skips the test without the plugin."""
    plugins = importlib.util.find_spec("jax_plugins")
    folders = (plugins and plugins.submodule_search_locations) or []
    if not any(path for folder in folders for path in pathlib.Path(folder).glob("xla_cuda*")):
        pytest.skip("JAX's CUDA plugin is not installed (pip install jax[cuda13]); it compiles on any Linux machine")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, file, target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def placed(tree: Any, gpu: jax.sharding.Sharding) -> Any:
    """The shapes of a tree's arrays, on the GPU."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=gpu), tree)


def unstacked(model: Decoder) -> Decoder:
    """A decoder of shapes as GPUs hold it; see `Decoder.unstacked`, which needs arrays."""
    own = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), model.layers)
    return replaced(model, layers=nnx.List([own] * model.held_layers))


def main(programs: Programs, *, count_moved: bool = False) -> None:
    """Compile programs for one GPU of the kind that the command line names. A kernel that spills registers fails.

    Args:
      count_moved: count bytes of an iteration of the entry's only loop.
    """
    target = _TARGETS[sys.argv[1]]
    topology = topologies.get_topology_desc("", "cuda", target_config=_GPU.format(**target), topology="1x1x1")
    gpu = jax.sharding.SingleDeviceSharding(topology.devices[0])
    kind = jax.sharding.AbstractDevice(target["name"], None, "gpu")
    found = {}
    for name, lowered in programs:
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=kind)):
            program = lowered(gpu)
        with tempfile.TemporaryDirectory() as folder:
            asked = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True, "xla_dump_to": folder}
            done = program.compile(compiler_options=asked)
            # The later of two, which is there if graphs have been made, sorts last.
            launches = max(pathlib.Path(folder).glob("*thunk_sequence*.txt"))
            of_loop = _launches_of_loop(launches.read_text())
        memory, text = done.memory_analysis(), done.as_text()
        found[name] = {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            "kernels": len(re.findall(r'custom_call_target="(?:__gpu\$xla\.gpu\.triton|mosaic_gpu)', text)),
            "launches": of_loop,
            "moved": hlo_traffic.per_iteration(text) if count_moved else 0,
        }
    print(json.dumps(found))


def _launches_of_loop(sequence: str) -> list[str]:
    """What the host launches for each iteration of the program's outermost loop: kinds of XLA's thunks."""
    _, _, body = sequence.partition("\n  body:\n")
    return re.findall(r"^    \d+: (k\w+)", body, flags=re.MULTILINE)
