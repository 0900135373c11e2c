"""The device mesh, and where weights and activations lie on it.

Mesh axes: "data" cuts batches, "seq" the prompts of stage 1, "model" heads, MLP and vocabulary. Programs run on a mesh
inside one `jax.shard_map` that is manual over all axes: each device works on its part with the code that runs on a
single device, and what devices exchange stands in that code as `total`, `gathered` and their like, which do nothing
where an axis is not cut.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemfilter_jax.config import ModelConfig
from gemfilter_jax.errors import UserError

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
"""Logical axis -> mesh axis, None for a copy on each device."""

_Row = TypeVar("_Row")


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """How many parts each mesh axis cuts into."""

    data: int = 1
    seq: int = 1
    model: int = 1

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """From "data:1,seq:4,model:2"; axes that are left out are not cut.

        Raises:
          UserError: an unknown or repeated axis, or a size that is no number of at least 1.
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
        """How many devices it takes."""
        return self.data * self.seq * self.model

    @property
    def rows(self) -> int:
        """Into how many parts programs that leave sequences whole cut a batch."""
        return self.data * self.seq

    def __str__(self) -> str:
        return ",".join(f"{axis}:{getattr(self, axis)}" for axis in AXES)


def shape_of(mesh: Mesh | None) -> MeshShape:
    """The shape of a mesh; None is one device."""
    return MeshShape() if mesh is None else MeshShape(**mesh.shape)


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the first of some devices, all of this run's if None.

    Raises:
      UserError: there are too few.
    """
    present = jax.devices() if devices is None else devices
    if shape.size > len(present):
        raise UserError(f"mesh {shape} takes {shape.size} devices; there are {len(present)}")
    automatic = (jax.sharding.AxisType.Auto,) * len(AXES)
    sizes = (shape.data, shape.seq, shape.model)
    return jax.make_mesh(sizes, AXES, automatic, devices=present[: shape.size])


def check(config: ModelConfig, shape: MeshShape) -> None:
    """Raise a `UserError` if a model cannot be split over the model axis, with the sizes that could."""
    fitting = [size for size in range(1, config.heads + 1) if not _in_the_way(config, size)]
    if shape.model not in fitting:
        raise UserError(
            f"mesh {shape}: model:{shape.model} cannot split {_in_the_way(config, shape.model)} evenly; this model "
            f"takes model:{', '.join(map(str, fitting))}"
        )


def _in_the_way(config: ModelConfig, parts: int) -> str | None:
    """What of a model cannot be cut into so many parts; key heads may also be shared by several of them."""
    if config.heads % parts:
        return f"{config.heads} query heads"
    if config.kv_heads % parts and parts % config.kv_heads:
        return f"{config.kv_heads} key heads"
    return f"an MLP of {config.mlp_width}" if config.mlp_width % parts else None


def shapes(config: ModelConfig, devices: int, *, many_prompts: bool = False) -> list[MeshShape]:
    """All shapes for so many devices, the one with the fewest parts of the model first; see `automatic_shape`."""
    possible = [parts for parts in range(1, devices + 1) if devices % parts == 0 and not _in_the_way(config, parts)]
    rest = "data" if many_prompts else "seq"
    return [MeshShape(model=parts, **{rest: devices // parts}) for parts in possible]


def automatic_shape(
    config: ModelConfig, devices: int, *, weights: int, memory: int | None, many_prompts: bool = False
) -> MeshShape:
    """A shape for so many devices: as few parts of the model as fit, and the rest for prompts.

    Args:
      weights: bytes of the whole model. memory: of one device, None where it is not known, as on a CPU.
      many_prompts: the rest goes to the data axis instead of the seq axis.
    """
    possible = shapes(config, devices, many_prompts=many_prompts)
    roomy = [shape for shape in possible if memory is None or weights / shape.model <= memory / 2]
    return roomy[0] if roomy else possible[-1]


def without_seq(mesh: Mesh) -> Mesh:
    """The same devices with the seq axis joined to the data axis, for programs that do not cut sequences."""
    shape = shape_of(mesh)
    return Mesh(mesh.devices.reshape(shape.data * shape.seq, 1, shape.model), AXES)


def evenly(rows: Sequence[_Row], parts: int) -> list[_Row]:
    """Rows of a batch, the last one repeated until they can be cut into so many parts."""
    return [*rows, *[rows[-1]] * (-len(rows) % parts)]


def spec(*axes: str | None) -> Any:
    """The `PartitionSpec` of an array with these logical axes, None for one that is never cut."""
    return PartitionSpec(*(axis and RULES[axis] for axis in axes))


def partition(axes: tuple[str, ...], dimensions: int, config: ModelConfig, mesh: Mesh) -> PartitionSpec:
    """The layout of a parameter with logical `axes`, stacked or not; what cannot be cut evenly is copied."""
    units = {"vocab": config.vocab, "heads": config.heads, "kv_heads": config.kv_heads, "mlp": config.mlp_width}

    def onto(axis: str) -> str | None:
        name = RULES[axis]
        return name if name in mesh.axis_names and units[axis] % mesh.shape[name] == 0 else None

    return PartitionSpec(*(None,) * (dimensions - len(axes)), *map(onto, axes))


def specs(model: Any, mesh: Mesh) -> Any:
    """The `PartitionSpec` of every parameter of a decoder, abstract or not, in a tree like it."""

    def of(parameter: nnx.Param) -> nnx.Param:
        return jax.tree.map(
            lambda leaf: partition(parameter.get_metadata("axes"), len(leaf.shape), model.config, mesh), parameter
        )

    return jax.tree.map(of, model, is_leaf=lambda node: isinstance(node, nnx.Param))


def with_shardings(abstract: Any, mesh: Mesh | None) -> Any:
    """An abstract decoder that lies on `mesh`, and whose parameters know how; unchanged without one."""
    if mesh is None:
        return abstract

    def placed(leaf: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    laid_out = jax.tree.map(placed, abstract, specs(abstract, mesh))
    laid_out.mesh = mesh
    return laid_out
