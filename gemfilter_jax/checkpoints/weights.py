"""Builds a decoder from named tensors; every tensor must be known, and every parameter must be filled.

Tensors are read one at a time, in row blocks, and written into the parameters on their devices. Besides the model, host
memory holds at most two copies of one tensor.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from gemfilter_jax.config import ModelConfig
from gemfilter_jax.errors import UserError
from gemfilter_jax.models import families
from gemfilter_jax.models.transformer import Decoder
from gemfilter_jax.parallel.sharding import with_shardings

BytesRead = Callable[[int, int], None]
"""Called with (bytes read, bytes to read) as weights are loaded."""

_BLOCK_BYTES = 8 * 2**20
_LARGEST_INT8 = 127
_LONGEST_SHOWN = 10_000  # characters of a list of problems, whose length is up to the file


class Tensors(Protocol):
    """The tensors of a checkpoint under their Hugging Face names, matrices as [out, in]."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor."""
        ...

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of each tensor in its file."""
        ...

    @property
    def problems(self) -> Sequence[str]:
        """Problems with the set of tensors, one phrase each, such as a duplicate tensor."""
        ...

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a tensor, floating-point."""
        ...


@dataclasses.dataclass(frozen=True)
class Loading:
    """How to load a decoder.

    Attributes:
      dtype: of weights and activations. int8: hold matrices in int8 with scales.
      filter_layers: load only this many layers and no LM head; None for the whole model.
      mesh: devices to shard the weights over; None for the default device.
      progress: called as weights are read.
    """

    dtype: jnp.dtype
    int8: bool = False
    filter_layers: int | None = None
    mesh: jax.sharding.Mesh | None = None
    progress: BytesRead | None = None


@dataclasses.dataclass(frozen=True)
class _Part:
    """Rows of a tensor, and the parameter that they fill, whole or for one layer."""

    tensor: str
    start: int
    stop: int
    parameter: str
    layer: int | None


def abstract_decoder(config: ModelConfig, loading: Loading) -> Decoder:
    """A decoder of `jax.ShapeDtypeStruct`s, each with its sharding if there is a mesh."""
    abstract = jax.eval_shape(
        lambda: Decoder(
            config,
            dtype=loading.dtype,
            int8=loading.int8,
            filter_layers=loading.filter_layers,
            rngs=nnx.Rngs(0),
        )
    )
    return with_shardings(abstract, loading.mesh)


def build_decoder(config: ModelConfig, tensors: Tensors, loading: Loading, *, source: str) -> Decoder:
    """A decoder of `config` with weights from named tensors; `source` names the file or folder in messages.

    Raises:
      UserError: tensors are missing, unexpected, repeated or misshapen; names each of them, before anything is read.
    """
    check_tensors(config, tensors, source)
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract_decoder(config, loading))
    wanted = {parameter_name(path): leaf for path, leaf in leaves}
    held = config.layers if loading.filter_layers is None else loading.filter_layers
    parts = [part for part in _parts(config) if part.parameter in wanted and (part.layer or 0) < held]
    total, done = sum(_bytes(part, tensors) for part in parts), 0
    filled = {
        name: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        for name, leaf in wanted.items()
        if name.startswith("layers.")
    }
    for part in parts:
        values = _values(part, tensors, wanted[part.parameter])
        if not values.pop("finite"):
            logging.warning("%s: tensor %s holds values that are not finite numbers", source, part.tensor)
        for kind, value in values.items():
            name = part.parameter if kind == "values" else _scale_of(part.parameter)
            transpose = name.endswith(".kernel")
            if part.layer is not None:
                filled[name] = _put(filled[name], value, part.layer, transpose=transpose)
            else:
                filled[name] = _transposed(value) if transpose else value
        # Without this wait, reading would run ahead of the devices and keep many tensors in memory.
        jax.block_until_ready(filled[part.parameter])
        done += _bytes(part, tensors)
        if loading.progress:
            loading.progress(done, total)
    return jax.tree.unflatten(structure, [filled[name] for name in wanted])


def parameter_name(path: tuple) -> str:
    """The dotted name of a parameter at a path of the decoder's tree."""
    return ".".join(key.name for key in path[:-1])  # the last key is the Param's own


def _scale_of(parameter: str) -> str:
    return f"{parameter.rpartition('.')[0]}.scale"


@functools.cache
def _whole_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Dotted name -> shape of every parameter of the whole model, in the layout of a checkpoint's tensors."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract_decoder(config, Loading(jnp.dtype(jnp.float32))))
    shapes = {}
    for path, leaf in leaves:
        name = parameter_name(path)
        shape = leaf.shape[1:] if name.startswith("layers.") else leaf.shape
        shapes[name] = shape[::-1] if name.endswith(".kernel") else shape
    return shapes


@functools.cache
def _parts(config: ModelConfig) -> list[_Part]:
    """All parts of all tensors that a checkpoint of this config must hold."""
    shapes, parts = _whole_shapes(config), []
    for tensor, (layer, targets) in families.tensors(config).items():
        start = 0
        for target in targets:
            parameter = target if layer is None else f"layers.{target}"
            if parameter in shapes:
                stop = start + shapes[parameter][0]
                parts.append(_Part(tensor, start, stop, parameter, layer))
                start = stop
    return parts


def check_tensors(config: ModelConfig, tensors: Tensors, source: str) -> None:
    """Raise a `UserError` that lists the problems with the set of tensors."""
    if config.layers > len(tensors.shapes):
        raise UserError(
            f"{source}: the tensors do not fit the model's config: it says {config.layers} layers, "
            f"and there are {len(tensors.shapes)} tensors"
        )
    expected: dict[str, tuple[int, ...]] = {}
    for part in _parts(config):
        expected[part.tensor] = (part.stop, *_whole_shapes(config)[part.parameter][1:])
    found = {name: shape for name, shape in tensors.shapes.items() if not families.is_leftover(name, config)}
    _refuse([*tensors.problems, *_differences(expected, found)], source)


def check_arrays(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], int8: bool, source: str) -> None:
    """Raise a `UserError` that lists the problems with the shapes of a whole model's stored parameters."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract_decoder(config, Loading(jnp.dtype(jnp.float32), int8)))
    expected = {parameter_name(path): leaf.shape for path, leaf in leaves}
    _refuse(_differences(expected, shapes), source)


def _differences(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    return [
        *(f"{name} is missing" for name in expected if name not in found),
        *(
            f"{name} has shape {list(found[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != tuple(shape)
        ),
        *(f"{name} is unexpected" for name in found if name not in expected),
    ]


def _refuse(problems: list[str], source: str) -> None:
    if problems:
        listed = "; ".join(_layers_joined(problems))
        shown = listed if len(listed) <= _LONGEST_SHOWN else f"{listed[:_LONGEST_SHOWN]} ..."
        raise UserError(f"{source}: the tensors do not fit the model's config: {shown}")


def _layers_joined(problems: list[str]) -> list[str]:
    """Merge problems that differ only in the layer number into one."""
    layers: dict[str, list[str]] = {}
    for problem in problems:
        number = re.search(r"(?<=layers\.)\d+", problem)
        layers.setdefault(re.sub(r"(?<=layers\.)\d+", "{}", problem, count=1), []).append(number[0] if number else "")
    return [template.replace("{}", ",".join(numbers), 1) for template, numbers in layers.items()]


def _bytes(part: _Part, tensors: Tensors) -> int:
    return tensors.sizes[part.tensor] * (part.stop - part.start) // max(tensors.shapes[part.tensor][0], 1)


def _values(part: _Part, tensors: Tensors, leaf: jax.ShapeDtypeStruct) -> dict[str, jax.Array]:
    """Load a part onto its devices in the file's layout: `values`, `scales` if int8, and whether all are `finite`."""
    rows = part.stop - part.start
    step = max(1, _BLOCK_BYTES * rows // max(_bytes(part, tensors), 1))
    values = np.empty((rows, *tensors.shapes[part.tensor][1:]), leaf.dtype)
    scales = np.empty(rows, np.float32) if leaf.dtype == jnp.int8 else None
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        read = tensors.rows(part.tensor, part.start + block.start, part.start + block.stop)
        if scales is None:
            values[block] = read
        else:
            values[block], scales[block] = _quantised(read)
    sharding, scale_sharding = leaf.sharding, None
    if isinstance(sharding, jax.sharding.NamedSharding):
        spec = sharding.spec if part.layer is None else sharding.spec[1:]
        spec = spec[::-1] if part.parameter.endswith(".kernel") else spec
        sharding, scale_sharding = (
            jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*axes)) for axes in (spec, spec[:1])
        )
    placed = {"values": jax.block_until_ready(jax.device_put(values, sharding))}
    if scales is not None:
        placed["scales"] = jax.device_put(scales, scale_sharding)
    return placed | {"finite": _all_finite(placed.get("scales", placed["values"]))}


def _quantised(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows [out, in] in symmetric int8, and one scale per row: its largest magnitude becomes 127."""
    wide = matrix.astype(np.float32)
    scales = np.abs(wide).max(axis=1) / _LARGEST_INT8
    with np.errstate(invalid="ignore"):  # a row that is not finite has a scale that is not finite
        return np.rint(wide / np.where(scales == 0, 1, scales)[:, None]).astype(np.int8), scales


@jax.jit
def _all_finite(values: jax.Array) -> jax.Array:
    return jnp.isfinite(values).all()


@functools.partial(jax.jit, donate_argnums=0, static_argnames="transpose")
def _put(stack: jax.Array, value: jax.Array, layer: int, *, transpose: bool) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, value.T if transpose else value, layer, axis=0)


@jax.jit
def _transposed(matrix: jax.Array) -> jax.Array:
    return matrix.T
