"""Small things that several test files build on: a random decoder, its programs' inputs, a prompt of plain ids."""

import functools

import numpy as np
from flax import nnx

from gemfilter_jax.config import ModelConfig
from gemfilter_jax.models.transformer import Decoder
from gemfilter_jax.text.prompt import Prompt

CONTEXT = 256
CONFIG = ModelConfig(
    family="llama",
    layers=4,
    width=32,
    heads=4,
    kv_heads=2,
    head_width=8,
    mlp_width=64,
    vocab=128,
    context=CONTEXT,
    rms_eps=1e-5,
    rope_theta=10000.0,
)


@functools.cache
def decoder() -> Decoder:
    """One model for the whole run: its programs are compiled once."""
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


def random_ids(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, length]).integers(0, CONFIG.vocab, length, dtype=np.int32)


def prompt_of(ids: np.ndarray, prefix: int = 0, suffix: int = 0) -> Prompt:
    """A prompt without text, for what looks at tokens only."""
    return Prompt("", ids, np.zeros((len(ids), 2), np.int64), prefix, suffix)
