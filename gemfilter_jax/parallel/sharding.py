"""The device mesh, and how weights and activations are sharded over it.

Mesh axes: "data" shards batches, "seq" shards the prompts of stage 1, and "model" shards heads, MLP and vocabulary.
Weights lie sharded over model and seq together. Stage 2 computes on these shards: the seq axis joins the model axis.
Stage 1 gathers a layer's weights over the seq axis when it runs the layer.

Programs run on a mesh inside one `jax.shard_map` that is manual over all axes. Each device runs the single-device code
on its shard, and that code calls the functions of `collectives`, which do nothing along an unsharded axis.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemfilter_jax.config import ModelConfig
from gemfilter_jax.errors import UserError
from gemfilter_jax.parallel import collectives

AXES = ("data", "seq", "model")
_ORDER = ("model", "seq", "data")  # of a mesh's devices, in which the seq axis can join either of the others

RULES = {
    "batch": "data",
    "sequence": "seq",
    "vocab": "model",
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
    "embed": None,
    "head_width": None,
}
"""Logical axis -> mesh axis, None to replicate it."""

_Row = TypeVar("_Row")


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """The size of each mesh axis."""

    data: int = 1
    seq: int = 1
    model: int = 1

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """Parse a text such as "data:1,seq:4,model:2"; omitted axes have size 1.

        Raises:
          UserError: an unknown or repeated axis, or a size that is not an integer of at least 1.
        """
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, _, size = part.strip().partition(":")
            if axis not in AXES or axis in sizes or not (size.isascii() and size.isdecimal() and int(size) >= 1):
                raise UserError(
                    f"mesh {text!r}: {part.strip()!r} is not one of {', '.join(f'{name}:N' for name in AXES)}, each "
                    f"at most once and N at least 1"
                )
            sizes[axis] = int(size)
        return cls(**sizes)

    @property
    def size(self) -> int:
        """The number of devices."""
        return self.data * self.seq * self.model

    @property
    def rows(self) -> int:
        """The number of batch shards in programs of stage 1 that do not shard sequences."""
        return self.data * self.seq

    def generating(self, config: ModelConfig) -> "MeshShape":
        """The shape in stage 2: the seq axis joins the model axis, or the data axis if the model has too few heads."""
        parts = self.seq * self.model
        return MeshShape(self.rows, 1, self.model) if _in_the_way(config, parts) else MeshShape(self.data, 1, parts)

    def __str__(self) -> str:
        return ",".join(f"{axis}:{getattr(self, axis)}" for axis in AXES)


def shape_of(mesh: Mesh | None) -> MeshShape:
    """The shape of a mesh; None means one device."""
    if mesh is None:
        return MeshShape()
    return MeshShape(**{"seq" if name == "rows" else name: size for name, size in mesh.shape.items()})


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the first of `devices`; None for all devices of this run.

    Raises:
      UserError: there are too few devices.
    """
    present = jax.devices() if devices is None else devices
    if shape.size > len(present):
        raise UserError(f"mesh {shape} takes {shape.size} devices; there are {len(present)}")
    automatic = (jax.sharding.AxisType.Auto,) * len(AXES)
    mesh = jax.make_mesh((shape.data, shape.seq, shape.model), AXES, automatic, devices=present[: shape.size])
    return Mesh(mesh.devices.transpose(), _ORDER, axis_types=automatic)


def check(config: ModelConfig, shape: MeshShape) -> None:
    """Raise a `UserError` if the model axis cannot shard a model; the message lists the sizes that can."""
    fitting = [size for size in range(1, config.heads + 1) if not _in_the_way(config, size)]
    if shape.model not in fitting:
        raise UserError(
            f"mesh {shape}: model:{shape.model} cannot split {_in_the_way(config, shape.model)} evenly; this model "
            f"takes model:{', '.join(map(str, fitting))}"
        )


def _in_the_way(config: ModelConfig, parts: int) -> str | None:
    """The dimension of a model that `parts` shards cannot split evenly, if any; several shards may share a key head."""
    if config.heads % parts:
        return f"{config.heads} query heads"
    if config.kv_heads % parts and parts % config.kv_heads:
        return f"{config.kv_heads} key heads"
    return f"an MLP of {config.mlp_width}" if config.mlp_width % parts else None


def shapes(config: ModelConfig, devices: int, *, many_prompts: bool = False) -> list[MeshShape]:
    """All mesh shapes for a number of devices, the smallest model axis first; see `automatic_shape`."""
    possible = [parts for parts in range(1, devices + 1) if devices % parts == 0 and not _in_the_way(config, parts)]
    rest = "data" if many_prompts else "seq"
    return [MeshShape(model=parts, **{rest: devices // parts}) for parts in possible]


def automatic_shape(
    config: ModelConfig, devices: int, *, weights: int, memory: int | None, many_prompts: bool = False
) -> MeshShape:
    """A mesh shape for a number of devices: the smallest model axis whose shards fit, and the rest on the seq axis.

    Args:
      weights: bytes of the whole model. memory: bytes of one device; None if unknown, as on a CPU.
      many_prompts: put the rest on the data axis instead of the seq axis.
    """
    possible = shapes(config, devices, many_prompts=many_prompts)
    roomy = [shape for shape in possible if memory is None or weights / shape.generating(config).model <= memory / 2]
    return roomy[0] if roomy else possible[-1]


def evenly(rows: Sequence[_Row], parts: int) -> list[_Row]:
    """Rows of a batch, the last one repeated until their number is a multiple of `parts`."""
    return [*rows, *[rows[-1]] * (-len(rows) % parts)]


def spec(*axes: str | None) -> Any:
    """The `PartitionSpec` of an array with these logical axes, None for an axis that is never sharded."""
    return PartitionSpec(*(axis and RULES[axis] for axis in axes))


def _parts(config: ModelConfig, shape: MeshShape, axis: str) -> int:
    """The number of shards of a parameter's logical axis; 1 if it is replicated."""
    units = {"vocab": config.vocab, "heads": config.heads, "kv_heads": config.kv_heads, "mlp": config.mlp_width}
    parts = shape.generating(config).model
    return parts if axis in units and units[axis] % parts == 0 else 1


def partition(axes: tuple[str, ...], dimensions: int, config: ModelConfig, mesh: Mesh) -> PartitionSpec:
    """Layout of a parameter with logical `axes`, stacked or not; axes that do not divide evenly are replicated."""
    shape = shape_of(mesh)
    holding = ("model",) if shape.generating(config).model == shape.model else mesh.axis_names[:2]

    def onto(axis: str) -> tuple[str, ...] | None:
        return None if _parts(config, shape, axis) == 1 else holding

    return PartitionSpec(*(None,) * (dimensions - len(axes)), *map(onto, axes))


def specs(model: Any, mesh: Mesh) -> Any:
    """The `PartitionSpec` of every parameter of a decoder, abstract or not, in a tree of the same structure."""

    def of(parameter: nnx.Param) -> nnx.Param:
        return jax.tree.map(
            lambda leaf: partition(parameter.get_metadata("axes"), len(leaf.shape), model.config, mesh), parameter
        )

    return jax.tree.map(of, model, is_leaf=lambda node: isinstance(node, nnx.Param))


Role = Literal["sequences", "rows", "model"]
"""What the seq axis shards in a program: sequences, the batch together with the data axis, or the model."""


def on_devices(
    model: Any, fn: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: Any, *, seq: Role
) -> Callable[..., Any]:
    """Bind the decoder in fn(model, ...); the result runs on the decoder's mesh if it has one.

    Args:
      in_specs, out_specs: `PartitionSpec`s; one can cover a whole subtree. None in `in_specs` replicates an argument.
      seq: what the seq axis shards.
    """
    if model.mesh is None:
        return functools.partial(fn, model)
    mesh, types = model.mesh, model.mesh.axis_types
    if seq == "model":
        shape = shape_of(mesh).generating(model.config)
        mesh = Mesh(mesh.devices.reshape(shape.model, 1, shape.data), _ORDER, axis_types=types)
    elif seq == "rows":
        mesh = Mesh(mesh.devices, tuple("rows" if name == "seq" else name for name in _ORDER), axis_types=types)
        in_specs, out_specs = jax.tree.map(_over_rows, (in_specs, out_specs), is_leaf=_is_spec)
    return functools.partial(collectives.shard_map(mesh, fn, (specs(model, mesh), *in_specs), out_specs), model)


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)


def _over_rows(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(("rows", "data") if axis == "data" else axis for axis in spec))


def gathered(weights: Any, config: ModelConfig) -> Any:
    """Parameters as the traced program computes with them: gathered over the seq axis, unless it joins the model axis.

    Args:
      weights: a tree of a decoder's parameters, each this device's shard; the leading axis of layers may be missing.
    """
    axis = "rows" if collectives.axis_size("rows") > 1 else "seq"
    shape = MeshShape(seq=collectives.axis_size(axis), model=collectives.axis_size("model"))
    if shape.seq == 1 or shape.generating(config).model == shape.model:
        return weights

    def of(parameter: nnx.Param) -> nnx.Param:
        axes = parameter.get_metadata("axes")

        def along(x: jax.Array, name: str, dimension: int) -> jax.Array:
            if _parts(config, shape, name) > 1:
                return collectives.all_gather(x, axis, dimension)
            shards = _parts(config, MeshShape(model=shape.model), name)
            return x if shards == 1 else collectives.own_shard(x, "model", dimension)

        def of_leaf(x: jax.Array) -> jax.Array:
            for back, name in enumerate(reversed(axes), start=1):
                x = along(x, name, x.ndim - back)
            return x

        return jax.tree.map(of_leaf, parameter)

    return jax.tree.map(of, weights, is_leaf=lambda node: isinstance(node, nnx.Param))


def with_shardings(abstract: Any, mesh: Mesh | None) -> Any:
    """An abstract decoder on `mesh`, with a sharding for each parameter; unchanged if `mesh` is None."""
    if mesh is None:
        return abstract

    def placed(leaf: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(placed, abstract, specs(abstract, mesh)).replace(mesh=mesh)
