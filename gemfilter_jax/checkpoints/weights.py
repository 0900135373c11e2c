"""From named tensors to a decoder: every tensor of the file accounted for, every parameter of the model filled."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemfilter_jax.config import ModelConfig
from gemfilter_jax.errors import UserError
from gemfilter_jax.models import llama
from gemfilter_jax.models.decoder import Decoder

_PROBLEMS_SHOWN = 5


def tensor_names(layers: int) -> list[str]:
    """Every Hugging Face tensor name that a checkpoint of the Llama family may hold."""
    return list(llama.MODEL_WEIGHTS) + [name.format(layer=i) for name in llama.LAYER_WEIGHTS for i in range(layers)]


def build_decoder(
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    *,
    dtype: jax.typing.DTypeLike,
    source: str,
) -> Decoder:
    """A decoder of `config` with weights from named tensors.

    Args:
      shapes: the shape of every tensor at hand, under its Hugging Face name, matrices as [out, in].
      read: gives a tensor of `shapes` by name.
      dtype: of the decoder's weights.
      source: the file or folder, for error messages.

    Raises:
      UserError: names every missing, unexpected and misshapen tensor before anything is read.
    """
    abstract = jax.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    wanted = [(_tensors_of(path, config.layers), leaf) for path, leaf in leaves]
    _check(wanted, config, shapes, source)

    def fill(names: list[str], stacked: bool, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        buffer = np.empty(leaf.shape, leaf.dtype)
        for index, name in enumerate(names):
            tensor = read(name)
            target = buffer[index] if stacked else buffer
            target[...] = tensor if _keeps_layout(name, tensor.shape) else tensor.T
        return jnp.asarray(buffer)

    return jax.tree.unflatten(structure, [fill(names, stacked, leaf) for (names, stacked), leaf in wanted])


def _tensors_of(path: tuple, layers: int) -> tuple[list[str], bool]:
    """The tensors that fill the parameter at a path of the decoder's tree, and whether they are stacked by layer."""
    attributes = tuple(key.name for key in path[:-1])  # the last key is the Param's own
    if attributes[0] == "layers":
        template = next(name for name, target in llama.LAYER_WEIGHTS.items() if target == attributes[1:])
        return [template.format(layer=i) for i in range(layers)], True
    return [next(name for name, target in llama.MODEL_WEIGHTS.items() if target == attributes)], False


def _keeps_layout(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) < 2 or name == "model.embed_tokens.weight"


def _check(wanted, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    expected = {}
    for (names, stacked), leaf in wanted:
        shape = leaf.shape[1:] if stacked else leaf.shape
        expected.update({name: shape if _keeps_layout(name, shape) else shape[::-1] for name in names})
    problems = [f"{name} is missing" for name in expected if name not in shapes]
    problems += [
        f"{name} has shape {list(shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != tuple(shape)
    ]
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    problems += [
        f"{name} is unexpected"
        for name in sorted(set(shapes) - set(expected) - tied)
        if not name.endswith(llama.IGNORED_SUFFIXES)
    ]
    if problems:
        more = f" (and {len(problems) - _PROBLEMS_SHOWN} more)" if len(problems) > _PROBLEMS_SHOWN else ""
        raise UserError(
            f"{source}: the tensors do not fit the model's config: {'; '.join(problems[:_PROBLEMS_SHOWN])}{more}"
        )
