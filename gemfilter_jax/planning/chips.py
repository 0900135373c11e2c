"""Rentable TPU chips: published specifications, topologies, and the devices that the compiler describes."""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import re
import sys

from gemfilter_jax.errors import UserError, reason

_LIBTPU = pathlib.Path(sys.prefix, "libtpu")  # where `make test` installs it


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator chip.

    Attributes:
      memory: bytes that XLA's compiler lets a program use, a little less than the published size.
      flops: peak bfloat16 operations per second. bandwidth: memory bandwidth in bytes per second.
      link: bytes per second to one neighbour, in one direction.
      topologies: rentable topologies, smallest first.
    """

    memory: int
    flops: float
    bandwidth: float
    link: float
    topologies: tuple[str, ...]


_OF_256 = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CHIPS = {
    "v5e": Chip(int(15.75 * 2**30), 197e12, 819e9, 400e9 / 4 / 2, _OF_256),
    "v6e": Chip(int(31.24 * 2**30), 918e12, 1638e9, 800e9 / 4 / 2, _OF_256),
    "v5p": Chip(
        int(95.73 * 2**30), 459e12, 2765e9, 1200e9 / 6 / 2, ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")
    ),
}
"""Google Cloud's documentation, pages "TPU v5e", "TPU v6e" and "TPU v5p": peak compute, HBM bandwidth, and the
bidirectional interconnect bandwidth of all ports of a chip, 4 of a 2D torus and 6 of a 3D torus."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of devices and their layout.

    Attributes:
      kind: a chip name in `CHIPS`, or "cpu". shape: a grid of chips such as "2x4", or the number of CPU devices.
    """

    kind: str
    shape: str

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Parse "v5e:2x4" or "cpu:8".

        Raises:
          UserError: the kind is unknown or the shape is malformed.
        """
        kind, _, shape = text.partition(":")
        pattern = r"[1-9]\d{0,3}" if kind == "cpu" else r"[1-9]\d{0,2}(x[1-9]\d{0,2}){1,2}"
        if kind not in (*CHIPS, "cpu") or not re.fullmatch(pattern, shape, re.ASCII):
            kinds = "; ".join(f"{kind}:{', '.join(chip.topologies)}" for kind, chip in CHIPS.items())
            raise UserError(f"topology {text!r} is unknown; {kinds}; or cpu:N for N devices of this processor")
        return cls(kind, shape)

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(map(int, self.shape.split("x")))

    @property
    def chip(self) -> Chip | None:
        """The chip, or None for a CPU, whose memory and speed are unknown."""
        return CHIPS.get(self.kind)

    @property
    def larger(self) -> list["Topology"]:
        """Topologies of the same chip with more devices, smallest first."""
        shapes = self.chip.topologies if self.chip else ()
        return [other for shape in shapes if (other := Topology(self.kind, shape)).size > self.size]

    def __str__(self) -> str:
        return f"{self.kind}:{self.shape}"


def prepare_process(topology: Topology) -> None:
    """Set up this process, before it imports JAX, to compile for a topology and to run on the host CPU.

    Raises:
      UserError: the topology has TPU chips and their compiler is not installed.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    if topology.chip is None:
        count = f"--xla_force_host_platform_device_count={topology.size}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
        return
    if importlib.util.find_spec("libtpu") is None:
        if not _LIBTPU.is_dir():
            raise UserError(f"topology {topology} takes TPU's compiler, which runs anywhere: pip install libtpu")
        sys.path.append(str(_LIBTPU))
    os.environ |= {
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any value works: each call of the compiler names its chips
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def devices(topology: Topology) -> list:
    """The devices of a topology. TPU devices need not be present; CPU devices are those of this machine.

    Raises:
      UserError: the compiler does not know the topology.
    """
    import jax
    from jax.experimental import topologies

    if topology.chip is None:
        return jax.devices()
    one_chip = {"chips_per_host_bounds": (1, 1, 1)} if topology.size == 1 else {}  # libtpu 0.0.42 assumes four chips
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=str(topology), **one_chip)
        return list(described.devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"topology {topology}: {reason(error)}") from error


def versions(topology: Topology) -> dict[str, str]:
    """Versions of the packages that a plan depends on."""
    names = ("jax", "libtpu") if topology.chip else ("jax",)
    return {name: importlib.metadata.version(name) for name in names}
