"""Collectives over mesh axes, under JAX's names. They do nothing along an axis that the program does not shard.

Programs run on a mesh inside one `jax.shard_map` that is manual over all axes. Each device runs the single-device code
on its shard, and that code calls the collectives explicitly. Where the seq axis shards the batch, it is named "rows",
and the axis "data" means both; see `sharding.on_devices`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec


def shard_map(mesh: Mesh, fn: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: Any) -> Callable[..., Any]:
    """`fn`, run on each device's shard of its arguments; None in `in_specs` replicates an argument."""
    in_specs = tuple(PartitionSpec() if one is None else one for one in in_specs)
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def platform() -> str:
    """The platform that the traced program will run on: that of its mesh, whose devices may be on another machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def compute_capability() -> str | None:
    """Compute capability, such as "9.0", of the NVIDIA GPU that the traced program will run on; see `platform`.

    None for other devices, and for a GPU on another machine if this process has no device of the same kind.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return getattr(jax.devices()[0], "compute_capability", None)
    try:
        present = jax.devices(device.platform)
    except RuntimeError:  # this process does not have the platform
        return None
    alike = (one for one in present if one.device_kind == device.device_kind)
    return getattr(next(alike, None), "compute_capability", None)


def _names(axis: str) -> tuple[str, ...]:
    """The axes of the traced program's mesh that an axis means."""
    meant = ("rows", "data") if axis == "data" else (axis,)
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(name for name in meant if name in manual)


def axis_size(axis: str) -> int:
    """Size of a mesh axis in the traced program; 1 if the program does not shard along it."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in _names(axis))


def axis_index(axis: str) -> jax.Array | int:
    """This device's index along a mesh axis."""
    return jax.lax.axis_index(_names(axis)) if axis_size(axis) > 1 else 0


def own_shard(x: jax.Array, axis: str, dimension: int) -> jax.Array:
    """This device's shard of an array that every device holds whole."""
    size = x.shape[dimension] // axis_size(axis)
    return jax.lax.dynamic_slice_in_dim(x, axis_index(axis) * size, size, dimension) if axis_size(axis) > 1 else x


def psum(x: jax.Array, axis: str) -> jax.Array:
    """The sum over a mesh axis."""
    return jax.lax.psum(x, _names(axis)) if axis_size(axis) > 1 else x


def pmax(x: jax.Array, axis: str) -> jax.Array:
    """The largest value along a mesh axis."""
    return jax.lax.pmax(x, _names(axis)) if axis_size(axis) > 1 else x


def all_gather(x: jax.Array, axis: str, dimension: int) -> jax.Array:
    """All shards along a mesh axis, concatenated."""
    return jax.lax.all_gather(x, _names(axis), axis=dimension, tiled=True) if axis_size(axis) > 1 else x


def to_host(tree: Any) -> Any:
    """A tree of arrays as NumPy arrays, whole on every process, wherever their shards are."""
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def any_row(x: jax.Array) -> jax.Array:
    """Whether x is true in any row of the batch, on any device."""
    return pmax(x.any().astype(jnp.int32), "data") > 0
