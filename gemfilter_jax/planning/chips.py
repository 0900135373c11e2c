"""Chips that can be rented, what their makers publish of them, and how they are wired together."""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import re
import sys

from gemfilter_jax.errors import UserError, reason

_LIBTPU = pathlib.Path(sys.prefix, "libtpu")  # where `make test` puts it


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      memory: bytes that XLA's compiler lets programs have; a little less than is published.
      flops: bfloat16 operations a second, at most. bandwidth: bytes a second from memory.
      link: bytes a second to one neighbour, in one direction.
      topologies: that are for rent, from the smallest.
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
    """Some devices.

    Attributes:
      kind: of chip, a name of `CHIPS`, or "cpu". shape: as in "2x4", or a number of CPU devices.
    """

    kind: str
    shape: str

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """From "v5e:2x4" or "cpu:8".

        Raises:
          UserError: an unknown kind or shape.
        """
        kind, _, shape = text.partition(":")
        pattern = r"[1-9]\d{0,3}" if kind == "cpu" else r"[1-9]\d{0,2}(x[1-9]\d{0,2}){1,2}"
        if kind not in (*CHIPS, "cpu") or not re.fullmatch(pattern, shape, re.ASCII):
            kinds = "; ".join(f"{kind}:{', '.join(chip.topologies)}" for kind, chip in CHIPS.items())
            raise UserError(f"topology {text!r} is unknown; {kinds}; or cpu:N for N devices of this processor")
        return cls(kind, shape)

    @property
    def size(self) -> int:
        """How many devices."""
        return math.prod(map(int, self.shape.split("x")))

    @property
    def chip(self) -> Chip | None:
        """None for a CPU, of which nothing is known."""
        return CHIPS.get(self.kind)

    @property
    def larger(self) -> list["Topology"]:
        """Those of the same chip that have more devices, from the smallest."""
        shapes = self.chip.topologies if self.chip else ()
        return [other for shape in shapes if (other := Topology(self.kind, shape)).size > self.size]

    def __str__(self) -> str:
        return f"{self.kind}:{self.shape}"


def prepare_process(topology: Topology) -> None:
    """Have this process, which must not have imported JAX yet, compile for a topology and run on its processor.

    Raises:
      UserError: the topology is of TPU chips, and their compiler is not installed.
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
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any; what is asked of the compiler names its own chips
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def devices(topology: Topology) -> list:
    """The devices of a topology, which need not be present unless they are this machine's processor.

    Raises:
      UserError: the compiler knows no such topology.
    """
    import jax
    from jax.experimental import topologies

    if topology.chip is None:
        return jax.devices()
    one_chip = {"chips_per_host_bounds": (1, 1, 1)} if topology.size == 1 else {}  # libtpu 0.0.42 assumes four
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=str(topology), **one_chip)
        return list(described.devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"topology {topology}: {reason(error)}") from error


def versions(topology: Topology) -> dict[str, str]:
    """Of the packages that a plan hangs on."""
    names = ("jax", "libtpu") if topology.chip else ("jax",)
    return {name: importlib.metadata.version(name) for name in names}
