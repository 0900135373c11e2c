"""What the devices of a mesh exchange, as JAX names it; nothing along an axis that is not cut.

Programs run on a mesh inside one `jax.shard_map` that is manual over all axes: each device works on its part with the
code that runs on a single device, and each exchange stands where it happens.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec


def shard_map(mesh: Mesh, fn: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: Any) -> Callable[..., Any]:
    """`fn` on each device's part of its arguments; None in `in_specs` for those that all devices have whole."""
    in_specs = tuple(PartitionSpec() if one is None else one for one in in_specs)
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def platform() -> str:
    """Where the program that is being traced will run: on its mesh, whose devices may be another machine's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def compute_capability() -> str | None:
    """Such as "9.0", of the NVIDIA GPU on which the program that is being traced will run, as `platform` has it.

    None where this process has no device of that kind to ask: other devices, and GPUs of another machine.
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


def axis_size(axis: str) -> int:
    """Size of a mesh axis in the program that is being traced; 1 where the program does not shard along it."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.manual_axes else 1


def axis_index(axis: str) -> jax.Array | int:
    """This device's index along a mesh axis."""
    return jax.lax.axis_index(axis) if axis_size(axis) > 1 else 0


def own_shard(x: jax.Array, axis: str, dimension: int) -> jax.Array:
    """This device's shard of an array that all devices have whole."""
    size = x.shape[dimension] // axis_size(axis)
    return jax.lax.dynamic_slice_in_dim(x, axis_index(axis) * size, size, dimension) if axis_size(axis) > 1 else x


def psum(x: jax.Array, axis: str) -> jax.Array:
    """The sum over a mesh axis."""
    return jax.lax.psum(x, axis) if axis_size(axis) > 1 else x


def pmax(x: jax.Array, axis: str) -> jax.Array:
    """The largest value along a mesh axis."""
    return jax.lax.pmax(x, axis) if axis_size(axis) > 1 else x


def all_gather(x: jax.Array, axis: str, dimension: int) -> jax.Array:
    """All shards along a mesh axis, concatenated."""
    return jax.lax.all_gather(x, axis, axis=dimension, tiled=True) if axis_size(axis) > 1 else x


def to_host(tree: Any) -> Any:
    """A tree of arrays in NumPy, whole on every process, wherever they lie."""
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def any_row(x: jax.Array) -> jax.Array:
    """Whether any of a batch's x is true, on any device."""
    return pmax(x.any().astype(jnp.int32), "data") > 0
