"""GGUF metadata of tiny vocabularies, as llama.cpp's converter writes it."""

import functools
import json
import pathlib
from typing import Any

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from gemfilter_jax.checkpoints.gguf_tokenizer import build_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_MERGES = [*("Ġ t", "h e", "Ġt he", "i n", "in g", "Ġ Ġ", "Ċ Ċ", "Ã ©", "' s", "1 2", "ð Ł", "ðŁ ĺ")]


@functools.cache
def golden() -> dict[str, Any]:
    return json.loads((pathlib.Path(__file__).parent / "golden/sentencepiece.json").read_text(encoding="utf-8"))


def sentencepiece(specials: dict[str, int] | None = None, **extra: Any) -> dict[str, Any]:
    """The golden vocabulary and `specials`, texts with their types; `extra` are further fields by their last name."""
    specials = specials or {}
    return _named(extra) | {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*golden()["tokens"], *specials],
        "tokenizer.ggml.scores": [*golden()["scores"], *(-1000.0 for _ in specials)],
        "tokenizer.ggml.token_type": [*golden()["types"], *specials.values()],
    }


def byte_level(pre: str = "qwen2", specials: dict[str, int] | None = None, **extra: Any) -> dict[str, Any]:
    """All bytes, a few merges and `specials`."""
    specials = specials or {}
    tokens = [*ALPHABET, *(merge.replace(" ", "") for merge in _MERGES), *specials]
    return _named(extra) | {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [NORMAL] * (len(tokens) - len(specials)) + list(specials.values()),
        "tokenizer.ggml.merges": _MERGES,
    }


def built(metadata: dict[str, Any]) -> PreTrainedTokenizerBase:
    return build_tokenizer(metadata, "tiny.gguf")


def token_id(metadata: dict[str, Any], token: str) -> int:
    return metadata["tokenizer.ggml.tokens"].index(token)


def _named(extra: dict[str, Any]) -> dict[str, Any]:
    return {"tokenizer.chat_template" if k == "chat_template" else f"tokenizer.ggml.{k}": v for k, v in extra.items()}
