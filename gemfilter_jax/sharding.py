"""Where weights lie on a device mesh: one table from the decoder's logical axes to mesh axes."""

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemfilter_jax.errors import UserError

RULES = {
    "vocab": "model",
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
    "embed": None,
    "head_width": None,
}
"""Logical axis of a parameter -> mesh axis, None for a copy on each device."""


def model_mesh(devices: int | None = None) -> Mesh:
    """A mesh that splits weights over so many devices, all by default.

    Raises:
      UserError: there are fewer devices.
    """
    present = jax.devices()
    if devices is not None and not 1 <= devices <= len(present):
        raise UserError(f"a mesh of {devices} devices was asked for; there are {len(present)}")
    automatic = (jax.sharding.AxisType.Auto,)  # XLA works out the layout of everything that is computed
    return jax.make_mesh((devices or len(present),), ("model",), automatic, devices=present[:devices])


def partition(axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The layout of a parameter; an axis that the mesh cannot split evenly is copied instead."""
    stacked = (None,) * (len(shape) - len(axes))
    spec = []
    for size, axis in zip(shape[len(stacked) :], axes, strict=True):
        onto = RULES[axis]
        spec.append(onto if onto in mesh.axis_names and size % mesh.shape[onto] == 0 else None)
    return PartitionSpec(*stacked, *spec)


def with_shardings(abstract, mesh: Mesh | None):
    """Abstract modules whose parameters know their layout on `mesh`; unchanged without one."""
    if mesh is None:
        return abstract

    def place(parameter: nnx.Param) -> nnx.Param:
        def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            sharding = NamedSharding(mesh, partition(parameter.get_metadata("axes"), leaf.shape, mesh))
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(placed, parameter)

    return jax.tree.map(place, abstract, is_leaf=lambda node: isinstance(node, nnx.Param))
