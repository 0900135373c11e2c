"""A plan: memory, work and time of both stages on some devices, beside those of full attention, and whether they fit.

Memory is what XLA's compiler reports of the compiled programs. FLOPs and what devices exchange are counted in the
programs (`costs`), in XLA's form of attention, whose kernels do the same in other blocks. Bytes from memory are an
estimate: weights once for each block of rows, activations and visible keys once for each use. Seconds are a bound: the
larger of arithmetic and memory traffic at published speeds, and what is exchanged over one link after that.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from gemfilter_jax.buckets import bucket
from gemfilter_jax.checkpoints.weights import Loading, abstract_decoder
from gemfilter_jax.methods.gemfilter import segments
from gemfilter_jax.models.transformer import Decoder
from gemfilter_jax.parallel import sharding
from gemfilter_jax.parallel.sharding import MeshShape
from gemfilter_jax.planning import chips, programs
from gemfilter_jax.planning.chips import Topology
from gemfilter_jax.planning.costs import Costs
from gemfilter_jax.planning.programs import Program, Request

_ROWS = 512  # that pass through a matrix at a time, and queries that read a key at a time
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device while a program runs.

    Attributes:
      weights: of the whole model, whether or not the program reads all of them.
      arguments: and results, the cache of stage 2 among them. temporaries: and the program itself.
    """

    weights: int
    arguments: int
    temporaries: int

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.arguments + self.temporaries


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of one device at published speeds: of arithmetic, of traffic from memory, of exchanges."""

    compute: float
    memory: float
    exchange: float

    @property
    def total(self) -> float:
        """Arithmetic and traffic overlap, exchanges come after."""
        return max(self.compute, self.memory) + self.exchange

    @property
    def bound(self) -> str:
        """Which of the three is the largest."""
        return max(("compute", "memory", "exchange"), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage on one device.

    Attributes:
      memory: None if it was not compiled, because a stage before it does not fit.
      costs: of all of the stage. traffic: bytes from memory. time: None where the device's speed is not known.
    """

    memory: Memory | None
    costs: Costs
    traffic: int
    time: Time | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a request takes.

    Attributes:
      stages: "filter", "prefill" and "decode"; of full attention "prefill" and "decode", which are not compiled.
      capacity: bytes of memory of one device. full_cache: bytes of full attention's cache on one device.
    """

    request: Request
    topology: Topology
    shape: MeshShape
    stages: dict[str, Stage]
    full_attention: dict[str, Stage]
    capacity: int
    full_cache: int

    @property
    def excess(self) -> int:
        """Bytes that one device lacks in the stage that takes most; not above 0 if all fit."""
        return max(stage.memory.total for stage in self.stages.values() if stage.memory) - self.capacity

    @property
    def fits(self) -> bool:
        """Whether all stages do."""
        return self.excess <= 0

    @property
    def notes(self) -> list[str]:
        """What to know of it."""
        request, found = self.request, []
        if request.tokens > request.config.context:
            found.append(
                f"{request.tokens:,} tokens are beyond the model's context of {request.config.context:,}: this plan is "
                "about bytes and seconds, not about what the model can read"
            )
        reach = segments.reach(request.config, request.method)
        if request.tokens > reach:
            found.append(
                f"`gemfilter generate` reads prompts beyond {reach:,} tokens in segments; this plan is of one pass"
            )
        return found


def make(request: Request, topology: Topology, shape: MeshShape | None) -> Plan:
    """A plan for a topology.

    Args:
      shape: of the mesh; None for the first that fits, of those that cut the model into few parts.

    Raises:
      UserError: the mesh or topology is impossible.
    """
    devices = chips.devices(topology)
    capacity = topology.chip.memory if topology.chip else _physical_memory() // topology.size
    for candidate in [shape] if shape else _candidates(request, topology, devices, capacity):
        sharding.check(request.config, candidate)
        model = abstract(request, sharding.make_mesh(candidate, devices), _dtype(topology))
        memory = dict(_memory(model, request))
        if _fit(memory.values(), capacity):
            break
    stages, full_attention = _stages(model, request, topology, memory)
    full_cache = _Traffic(model, request).cache(request.tokens)
    return Plan(request, topology, sharding.shape_of(model.mesh), stages, full_attention, capacity, full_cache)


def smallest_that_fits(plan: Plan) -> Topology | None:
    """The smallest larger topology of the same chip on which everything fits, None if there is none."""
    request = plan.request
    for topology in plan.topology.larger:
        devices = chips.devices(topology)
        for shape in _candidates(request, topology, devices, plan.capacity):
            model = abstract(request, sharding.make_mesh(shape, devices), _dtype(topology))
            if _fit((memory for _, memory in _memory(model, request)), plan.capacity):
                return topology
    return None


def abstract(request: Request, mesh: jax.sharding.Mesh, dtype: str) -> Decoder:
    """The model's shapes, laid out on a mesh."""
    return abstract_decoder(request.config, Loading(jnp.dtype(dtype), int8=request.int8, mesh=mesh))


def _dtype(topology: Topology) -> str:
    """Of weights and activations, as models are loaded there."""
    return "bfloat16" if topology.chip else "float32"


def _candidates(request: Request, topology: Topology, devices: list, capacity: int) -> list[MeshShape]:
    """Shapes to try: the automatic one and those with more parts of the model; the last if weights fit in none."""

    def weights(shape: MeshShape) -> int:
        return programs.bytes_on_device(abstract(request, sharding.make_mesh(shape, devices), _dtype(topology)))

    possible = sharding.shapes(request.config, len(devices))
    whole = weights(MeshShape())
    first = sharding.automatic_shape(request.config, len(devices), weights=whole, memory=capacity)
    later = possible[possible.index(first) :]
    return [shape for shape in later if weights(shape) < capacity] or later[-1:]


def _fit(memory: Iterable[Memory], capacity: int) -> bool:
    return all(one.total <= capacity for one in memory)


def _memory(model: Decoder, request: Request) -> Iterator[tuple[str, Memory]]:
    """Of each stage, as compiled; nothing of the one behind a prefill that lacks memory."""
    yield "filter", compiled(programs.filtering(model, request))[0]
    prefill = programs.prefill(model, request)
    memory, program = compiled(prefill)
    yield "prefill", memory
    if program is not None:
        yield "decode", compiled(programs.decode(prefill, program.output_shardings))[0]


def compiled(program: Program) -> tuple[Memory, Any]:
    """What a program takes, and the program; None in its place if it lacks memory."""
    weights, idle = programs.bytes_on_device(program.model), programs.bytes_on_device(program.idle)
    try:
        made = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"memory required[^(]*\(([\d.]+)([KMGT]?)\)", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or needed is None:
            raise
        given = programs.bytes_on_device((program.arguments, program.options))
        total = int(float(needed[1]) * _UNITS[needed[2]]) + idle
        return Memory(weights, given, total - weights - given), None
    report: Any = made.memory_analysis()
    given = report.argument_size_in_bytes + idle - weights
    results = report.output_size_in_bytes - report.alias_size_in_bytes
    return Memory(weights, given + results, report.temp_size_in_bytes + report.generated_code_size_in_bytes), made


def _stages(
    model: Decoder, request: Request, topology: Topology, memory: dict[str, Memory]
) -> tuple[dict[str, Stage], dict[str, Stage]]:
    """Those of the filter, and those of full attention: S tokens through all layers, then a cache of all of them."""
    traffic, steps = _Traffic(model, request), request.new_tokens - 1
    shape, kept = sharding.shape_of(model.mesh), request.method.keep

    def stage(name: str | None, counted: Costs, moved: int) -> Stage:
        return Stage(memory.get(name) if name else None, counted, moved, _time(counted, moved, topology))

    def decoding(cached: int) -> Costs:
        return programs.decode(programs.prefill(model, request, kept=cached)).costs() * steps

    width = request.method.band + request.method.first_tokens if request.is_tri_shape else None
    filtered = traffic.prompt(request.method.filter_layer, request.tokens, shape.data, shape.seq, width)
    stages = {
        "filter": stage("filter", programs.filtering(model, request).costs(), filtered),
        "prefill": stage(
            "prefill",
            programs.prefill(model, request).costs(),
            traffic.prompt(request.config.layers, kept, shape.rows, 1, None) + traffic.lm_head,
        ),
        "decode": stage("decode", decoding(kept), traffic.step(kept) * steps),
    }
    full = {
        "prefill": stage(
            None,
            programs.filtering(model, request, whole=True).costs(),
            traffic.prompt(request.config.layers, request.tokens, shape.data, shape.seq, None) + traffic.lm_head,
        ),
        "decode": stage(None, decoding(request.tokens), traffic.step(request.tokens) * steps),
    }
    return stages, full


class _Traffic:
    """Bytes that one device reads and writes, estimated."""

    def __init__(self, model: Decoder, request: Request):
        config, parts = request.config, sharding.shape_of(model.mesh).model
        self._request, self._shape = request, sharding.shape_of(model.mesh)
        self._item = jax.tree.leaves(model.embedding)[0].dtype.itemsize
        self._layer = programs.bytes_on_device(model.layers) // config.layers
        self._width, self._queries = config.width, config.heads * config.head_width // parts
        self._keys = 2 * max(config.kv_heads // parts, 1) * config.head_width
        self.lm_head = programs.bytes_on_device(model.embedding if model.lm_head is None else model.lm_head)

    def prompt(self, layers: int, length: int, rows: int, parts: int, width: int | None) -> int:
        """Of a prompt through layers.

        Args:
          rows: parts of the batch. parts: of each prompt. width: keys that a query sees, all before it if None.
        """
        tokens = -(-self._request.batch // rows) * -(-length // parts)
        passes = -(-tokens // _ROWS)
        activations = tokens * (3 * self._width + 4 * self._queries + 2 * self._keys)
        seen = passes * (length / 2 if width is None else min(width + _ROWS, length)) * self._keys
        return int(layers * (passes * self._layer + (activations + seen) * self._item))

    def step(self, cached: int) -> int:
        """Of one new token for each row, which reads weights and cache."""
        return self._request.config.layers * self._layer + self.cache(cached) + self.lm_head

    def cache(self, cached: int) -> int:
        """Of a cache in stage 2, which is cut over rows and key heads."""
        rows = -(-self._request.batch // self._shape.rows)
        capacity = bucket(cached) + bucket(self._request.new_tokens)
        return self._request.config.layers * rows * capacity * self._keys * self._item


def _time(counted: Costs, moved: int, topology: Topology) -> Time | None:
    chip = topology.chip
    return chip and Time(counted.flops / chip.flops, moved / chip.bandwidth, counted.sent / chip.link)


def _physical_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def as_json(plan: Plan) -> dict[str, Any]:
    """A plan as one JSON object."""
    request = plan.request

    def fields(stage: Stage) -> dict[str, Any]:
        exchanges = [
            {"kind": kind, "axis": axis, **dataclasses.asdict(one)}
            for (kind, axis), one in stage.costs.exchanges.items()
        ]
        made = {"flops": stage.costs.flops, "traffic_bytes": stage.traffic, "exchanges": exchanges}
        made["exchanged_bytes"] = stage.costs.exchanged
        if stage.memory:
            made["memory"] = {**dataclasses.asdict(stage.memory), "total": stage.memory.total}
        if stage.time:
            made["seconds"] = {**dataclasses.asdict(stage.time), "total": stage.time.total, "bound": stage.time.bound}
        return made

    return {
        "command": "plan",
        "tokens": request.tokens,
        "batch": request.batch,
        "keep": request.method.keep,
        "max_new_tokens": request.new_tokens,
        "filter_layer": request.method.filter_layer,
        "filter_attention": "tri_shape" if request.is_tri_shape else "dense",
        "filter_precision": request.method.filter_precision,
        "weights": "int8" if request.int8 else "float",
        "topology": str(plan.topology),
        "devices": plan.topology.size,
        "mesh": dataclasses.asdict(plan.shape),
        "device_memory": plan.capacity,
        "stages": {name: fields(stage) for name, stage in plan.stages.items()},
        "full_attention": {name: fields(stage) for name, stage in plan.full_attention.items()},
        "full_attention_cache_bytes": plan.full_cache,
        "fits": plan.fits,
        "excess_bytes": max(plan.excess, 0),
        "notes": plan.notes,
    }
