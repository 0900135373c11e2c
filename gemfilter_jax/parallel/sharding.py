"""The device mesh, and how weights and activations are sharded over it.

Mesh axes: "data" shards batches, "seq" shards the prompts of stage 1, and "model" shards heads, MLP and vocabulary.
Programs run on a mesh inside one `jax.shard_map` that is manual over all axes. Each device runs the single-device code
on its shard, and that code calls the functions of `collectives`, which do nothing along an unsharded axis.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemfilter_jax.config import ModelConfig
from gemfilter_jax.errors import UserError
from gemfilter_jax.parallel import collectives

AXES = ("data", "seq", "model")

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
        """The number of batch shards in programs that do not shard sequences."""
        return self.data * self.seq

    def __str__(self) -> str:
        return ",".join(f"{axis}:{getattr(self, axis)}" for axis in AXES)


def shape_of(mesh: Mesh | None) -> MeshShape:
    """The shape of a mesh; None means one device."""
    return MeshShape() if mesh is None else MeshShape(**mesh.shape)


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the first of `devices`; None for all devices of this run.

    Raises:
      UserError: there are too few devices.
    """
    present = jax.devices() if devices is None else devices
    if shape.size > len(present):
        raise UserError(f"mesh {shape} takes {shape.size} devices; there are {len(present)}")
    automatic = (jax.sharding.AxisType.Auto,) * len(AXES)
    sizes = (shape.data, shape.seq, shape.model)
    return jax.make_mesh(sizes, AXES, automatic, devices=present[: shape.size])


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
    roomy = [shape for shape in possible if memory is None or weights / shape.model <= memory / 2]
    return roomy[0] if roomy else possible[-1]


def without_seq(mesh: Mesh) -> Mesh:
    """The same devices with the seq axis merged into the data axis, for programs that do not shard sequences."""
    shape = shape_of(mesh)
    return Mesh(mesh.devices.reshape(shape.data * shape.seq, 1, shape.model), AXES)


def evenly(rows: Sequence[_Row], parts: int) -> list[_Row]:
    """Rows of a batch, the last one repeated until their number is a multiple of `parts`."""
    return [*rows, *[rows[-1]] * (-len(rows) % parts)]


def spec(*axes: str | None) -> Any:
    """The `PartitionSpec` of an array with these logical axes, None for an axis that is never sharded."""
    return PartitionSpec(*(axis and RULES[axis] for axis in axes))


def partition(axes: tuple[str, ...], dimensions: int, config: ModelConfig, mesh: Mesh) -> PartitionSpec:
    """Layout of a parameter with logical `axes`, stacked or not; axes that do not divide evenly are replicated."""
    units = {"vocab": config.vocab, "heads": config.heads, "kv_heads": config.kv_heads, "mlp": config.mlp_width}

    def onto(axis: str) -> str | None:
        name = RULES[axis]
        return name if name in mesh.axis_names and units[axis] % mesh.shape[name] == 0 else None

    return PartitionSpec(*(None,) * (dimensions - len(axes)), *map(onto, axes))


def specs(model: Any, mesh: Mesh) -> Any:
    """The `PartitionSpec` of every parameter of a decoder, abstract or not, in a tree of the same structure."""

    def of(parameter: nnx.Param) -> nnx.Param:
        return jax.tree.map(
            lambda leaf: partition(parameter.get_metadata("axes"), len(leaf.shape), model.config, mesh), parameter
        )

    return jax.tree.map(of, model, is_leaf=lambda node: isinstance(node, nnx.Param))


def on_devices(
    model: Any,
    fn: Callable[..., Any],
    in_specs: tuple[Any, ...],
    out_specs: Any,
    *,
    cuts_sequences: bool = False,
) -> Callable[..., Any]:
    """Bind the decoder in fn(model, ...); the result runs on the decoder's mesh if it has one.

    Args:
      in_specs, out_specs: `PartitionSpec`s; one can cover a whole subtree. None in `in_specs` replicates an argument.
      cuts_sequences: whether the seq axis shards sequences; otherwise it is merged into the data axis.
    """
    if model.mesh is None:
        return functools.partial(fn, model)
    mesh = model.mesh if cuts_sequences else without_seq(model.mesh)
    return functools.partial(collectives.shard_map(mesh, fn, (specs(model, mesh), *in_specs), out_specs), model)


def with_shardings(abstract: Any, mesh: Mesh | None) -> Any:
    """An abstract decoder on `mesh`, with a sharding for each parameter; unchanged if `mesh` is None."""
    if mesh is None:
        return abstract

    def placed(leaf: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(placed, abstract, specs(abstract, mesh)).replace(mesh=mesh)
