"""Small things that several test files build on: a random decoder, its programs' inputs, a prompt of plain ids."""

import functools
import random

import numpy as np
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gemfilter_jax.checkpoints import Checkpoint
from gemfilter_jax.config import ModelConfig
from gemfilter_jax.methods.presets import preset_for
from gemfilter_jax.models.transformer import Decoder
from gemfilter_jax.pipeline import Pipeline
from gemfilter_jax.text.prompt import Prompt

CONTEXT = 256
_WORDS = 90
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


def words(count: int) -> str:
    """A text of so many words, each a token of `pipeline`."""
    return " ".join(f"w{random.Random(count + place).randrange(_WORDS)}" for place in range(count))


def pipeline(model: Decoder) -> Pipeline:
    """A model that reads words, and has neither template nor stop tokens."""
    vocabulary = Tokenizer(models.WordLevel({f"w{number}": number for number in range(_WORDS)}, unk_token="w0"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="w0")
    checkpoint = Checkpoint("tiny", model, tokenizer, stop_tokens=())
    preset = preset_for(model.config)
    return Pipeline(checkpoint, preset, chat_template=False, message_format="{text} {question}")
