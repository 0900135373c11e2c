"""A model of a published shape with random weights, whose time and memory are those of the real one."""

import functools

import jax
import jax.numpy as jnp
from transformers import PreTrainedTokenizerBase

from gemfilter_jax.checkpoints import embedded
from gemfilter_jax.checkpoints.gguf_file import GGUFFile
from gemfilter_jax.checkpoints.weights import Loading, abstract_decoder
from gemfilter_jax.config import ModelConfig
from gemfilter_jax.errors import UserError
from gemfilter_jax.models.transformer import Decoder

_DEVIATION = 0.02
_LARGEST_INT8 = 127


class RandomWeights:
    """A config, opened as a model. Its tokenizer is the default model's; its answers mean nothing.

    Raises:
      UserError: the vocabulary is smaller than the tokenizer's.
    """

    def __init__(self, config: ModelConfig, name: str):
        self.config = config
        self.name = f"{name}, random weights"
        self._default = GGUFFile(embedded.located_or_fetched())
        if config.vocab < self._default.config.vocab:
            raise UserError(
                f"{name}: the vocabulary has {config.vocab} tokens; random weights need the default model's "
                f"{self._default.config.vocab}"
            )

    def decoder(self, loading: Loading) -> Decoder:
        """The decoder, made on its devices."""
        leaves, structure = jax.tree.flatten(abstract_decoder(self.config, loading))
        keys = jax.random.split(jax.random.key(0), len(leaves))
        return jax.tree.unflatten(structure, map(_drawn, leaves, keys))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The default model's."""
        return self._default.tokenizer()

    def stop_tokens(self) -> tuple[int, ...]:
        """None."""
        return ()


def _drawn(leaf: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
    """An array like the leaf, drawn in blocks of its first axis so that nothing else is as large."""

    @functools.partial(jax.jit, out_shardings=leaf.sharding)
    def draw(key: jax.Array) -> jax.Array:
        def block(key: jax.Array) -> jax.Array:
            if leaf.dtype == jnp.int8:
                return jax.random.randint(key, leaf.shape[1:], -_LARGEST_INT8, _LARGEST_INT8 + 1, jnp.int8)
            return _DEVIATION * jax.random.normal(key, leaf.shape[1:], leaf.dtype)

        return jax.lax.map(block, jax.random.split(key, leaf.shape[0]))

    return draw(key)
