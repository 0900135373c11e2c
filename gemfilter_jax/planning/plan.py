"""A plan: memory, work and time of both stages on given devices, compared with full attention, and whether they fit.

Memory is the compiler's report on the compiled programs. FLOPs and collectives are counted in the programs (`costs`)
with XLA attention; the kernels do the same work in other blocks. Memory traffic is an estimate: weights are read once
for each block of rows, and in stage 1 written once where they are gathered; activations and visible keys count once for
each use. Seconds are a roofline bound: the larger of
arithmetic time and memory time at published speeds, plus the time of the collectives over one link.
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

_ROWS = 512  # rows per read of a weight matrix, and queries per read of a key
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device while a program runs.

    Attributes:
      weights: all weights of the model, even those that the program does not read.
      arguments: arguments and results, including the KV cache of stage 2.
      temporaries: temporary buffers and the compiled code.
    """

    weights: int
    arguments: int
    temporaries: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.arguments + self.temporaries


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds on one device at published speeds, for arithmetic, memory traffic and collectives."""

    compute: float
    memory: float
    exchange: float

    @property
    def total(self) -> float:
        """The total, if arithmetic and memory traffic overlap and collectives come after them."""
        return max(self.compute, self.memory) + self.exchange

    @property
    def bound(self) -> str:
        """The name of the largest of the three."""
        return max(("compute", "memory", "exchange"), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage on one device.

    Attributes:
      memory: None if the stage was not compiled: full attention, or a stage after one that does not fit.
      costs: costs of the whole stage. traffic: bytes of memory traffic. time: None if the device's speed is unknown.
    """

    memory: Memory | None
    costs: Costs
    traffic: int
    time: Time | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The resources that a request takes.

    Attributes:
      shape: of the mesh; `shape.generating` is that of stage 2.
      stages: "filter", "prefill" and "decode".
      full_attention: "prefill" and "decode" of full attention, which are not compiled.
      capacity: bytes of memory on one device. full_cache: bytes of full attention's KV cache on one device.
      token_traffic: bytes of memory traffic for each decoded token, those of a batch together.
    """

    request: Request
    topology: Topology
    shape: MeshShape
    stages: dict[str, Stage]
    full_attention: dict[str, Stage]
    capacity: int
    full_cache: int
    token_traffic: int

    @property
    def generating(self) -> MeshShape:
        """The mesh shape of stage 2."""
        return self.shape.generating(self.request.config)

    @property
    def excess(self) -> int:
        """Bytes by which the largest stage exceeds one device's memory; 0 or less if all stages fit."""
        return max(stage.memory.total for stage in self.stages.values() if stage.memory) - self.capacity

    @property
    def fits(self) -> bool:
        """Whether all stages fit."""
        return self.excess <= 0

    @property
    def notes(self) -> list[str]:
        """Caveats for readers of the plan."""
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
    """Plan a request on a topology.

    Args:
      shape: mesh shape; None for the first that fits, from the automatic shape to those with more model shards.

    Raises:
      UserError: the mesh or the topology is impossible.
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
    traffic = _Traffic(model, request)
    return Plan(
        request,
        topology,
        sharding.shape_of(model.mesh),
        stages,
        full_attention,
        capacity,
        full_cache=traffic.cache(request.tokens),
        token_traffic=traffic.step(request.method.keep),
    )


def smallest_that_fits(plan: Plan) -> Topology | None:
    """The smallest larger topology of the same chip on which everything fits, or None."""
    request = plan.request
    for topology in plan.topology.larger:
        devices = chips.devices(topology)
        for shape in _candidates(request, topology, devices, plan.capacity):
            model = abstract(request, sharding.make_mesh(shape, devices), _dtype(topology))
            if _fit((memory for _, memory in _memory(model, request)), plan.capacity):
                return topology
    return None


def abstract(request: Request, mesh: jax.sharding.Mesh, dtype: str) -> Decoder:
    """A model of shapes without weights, sharded over a mesh."""
    return abstract_decoder(request.config, Loading(jnp.dtype(dtype), int8=request.int8, mesh=mesh))


def _dtype(topology: Topology) -> str:
    """The default dtype of weights and activations on a topology."""
    return "bfloat16" if topology.chip else "float32"


def _candidates(request: Request, topology: Topology, devices: list, capacity: int) -> list[MeshShape]:
    """Mesh shapes in which the weights fit, from the automatic one to more model shards; else the last shape."""

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
    """The memory of each compiled stage, without the decode stage if the prefill exceeds the device's memory."""
    yield "filter", compiled(programs.filtering(model, request))[0]
    prefill = programs.prefill(model, request)
    memory, program = compiled(prefill)
    yield "prefill", memory
    if program is not None:
        yield "decode", compiled(programs.decode(prefill, program.output_shardings))[0]


def compiled(program: Program) -> tuple[Memory, Any]:
    """The memory of a program, and the compiled program or None if the program exceeds the device's memory."""
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
    """The stages of GemFilter, and those of full attention: S tokens through all layers, then a KV cache of all S."""
    traffic, steps = _Traffic(model, request), request.new_tokens - 1
    shape, kept = sharding.shape_of(model.mesh), request.method.keep
    generating = shape.generating(request.config)

    def stage(name: str | None, counted: Costs, moved: int) -> Stage:
        return Stage(memory.get(name) if name else None, counted, moved, _time(counted, moved, topology))

    def decoding(cached: int) -> Costs:
        return programs.decode(programs.prefill(model, request, kept=cached)).costs() * steps

    width = request.method.band + request.method.first_tokens if request.is_tri_shape else None
    filtered = traffic.prompt(request.method.filter_layer, request.tokens, shape, width)
    stages = {
        "filter": stage("filter", programs.filtering(model, request).costs(), filtered),
        "prefill": stage(
            "prefill",
            programs.prefill(model, request).costs(),
            traffic.prompt(request.config.layers, kept, generating, None) + traffic.lm_head,
        ),
        "decode": stage("decode", decoding(kept), traffic.step(kept) * steps),
    }
    full = {
        "prefill": stage(
            None,
            programs.filtering(model, request, whole=True).costs(),
            traffic.prompt(request.config.layers, request.tokens, shape, None) + traffic.lm_head,
        ),
        "decode": stage(None, decoding(request.tokens), traffic.step(request.tokens) * steps),
    }
    return stages, full


class _Traffic:
    """Estimates of the bytes that one device reads and writes."""

    def __init__(self, model: Decoder, request: Request):
        self._request, self._generating = request, sharding.shape_of(model.mesh).generating(request.config)
        self._item = jax.tree.leaves(model.embedding)[0].dtype.itemsize
        self._held = programs.bytes_on_device(model.layers) // request.config.layers
        self.lm_head = programs.bytes_on_device(model.embedding if model.lm_head is None else model.lm_head)

    def prompt(self, layers: int, length: int, shape: MeshShape, width: int | None) -> int:
        """Traffic of a prompt through some layers.

        Args:
          shape: of the mesh as the program uses it.
          width: keys that a query attends to; None for all keys before it.
        """
        config = self._request.config
        tokens = -(-self._request.batch // shape.data) * -(-length // shape.seq)
        passes = -(-tokens // _ROWS)
        queries, keys = config.heads * config.head_width // shape.model, self._keys(shape)
        activations = tokens * (3 * config.width + 4 * queries + 2 * keys)
        seen = passes * (length / 2 if width is None else min(width + _ROWS, length)) * keys
        gathered = self._generating.model // shape.model
        read = passes + (gathered > 1)
        return int(layers * (read * gathered * self._held + (activations + seen) * self._item))

    def _keys(self, shape: MeshShape) -> int:
        """Numbers in one device's keys and values of a token in a layer."""
        return 2 * max(self._request.config.kv_heads // shape.model, 1) * self._request.config.head_width

    def step(self, cached: int) -> int:
        """Traffic of one decode step, which reads the weights and the KV cache."""
        return self._request.config.layers * self._held + self.cache(cached) + self.lm_head

    def cache(self, cached: int) -> int:
        """Size of the KV cache in stage 2, which is sharded over rows and key heads."""
        rows = -(-self._request.batch // self._generating.data)
        capacity = bucket(cached) + bucket(self._request.new_tokens)
        return self._request.config.layers * rows * capacity * self._keys(self._generating) * self._item


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
        made |= {"exchanged_bytes": stage.costs.exchanged, "sent_bytes": stage.costs.sent}
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
        "mesh_of_stage_2": dataclasses.asdict(plan.generating),
        "device_memory": plan.capacity,
        "stages": {name: fields(stage) for name, stage in plan.stages.items()},
        "full_attention": {name: fields(stage) for name, stage in plan.full_attention.items()},
        "full_attention_cache_bytes": plan.full_cache,
        "traffic_bytes_per_decoded_token": plan.token_traffic,
        "fits": plan.fits,
        "excess_bytes": max(plan.excess, 0),
        "notes": plan.notes,
    }
