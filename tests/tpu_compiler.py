"""Programs compiled for TPU chips that this machine does not have: libtpu's compiler, in a process of its own."""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest
from jax.experimental import topologies

TOPOLOGIES = {"v5e:2x2": "v5litepod-4", "v6e:2x2": "v6e-4"}
every_topology = pytest.mark.parametrize("topology", ["v5e:2x2", pytest.param("v6e:2x2", marks=pytest.mark.exhaustive)])
_LIBTPU = pathlib.Path(sys.prefix, "libtpu")  # where `make test` puts it, out of sight of every other process

Programs = Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]
"""Name, function and `jax.ShapeDtypeStruct`s of its arguments."""


def skip_where_absent() -> None:
    """Skip the test that is running where there is no libtpu."""
    if not _LIBTPU.is_dir() and importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; it compiles for TPU on any Linux machine (`make test` installs it)")


@functools.cache
def compiled(file: str, topology: str) -> dict[str, dict[str, int]]:
    """What `main` makes of the programs of a test file: bytes on one chip and kernels, by the program's name."""
    skip_where_absent()
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(_LIBTPU), *sys.path]),
        "TPU_ACCELERATOR_TYPE": TOPOLOGIES[topology],
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    command = [sys.executable, file, topology]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def main(programs: Programs) -> None:
    """Compile programs for one chip of the topology that the command line names."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices[0]
    chip = jax.sharding.SingleDeviceSharding(device)
    found = {}
    for name, function, arguments in programs:
        on_chip = jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=chip), arguments)
        program = jax.jit(function).lower(*on_chip).compile()
        memory = program.memory_analysis()
        found[name] = {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "kernels": program.as_text().count("tpu_custom_call"),
        }
    print(json.dumps(found))
