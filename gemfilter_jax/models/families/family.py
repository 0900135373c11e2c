"""A model family: how to read its configs, and the names of the weights in its checkpoints."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from gemfilter_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """Models that share their Hugging Face code. Each is defined in a file of its own and listed in `FAMILIES`.

    Attributes:
      model_types: the values of `model_type` in config.json; the first is also the family of a GGUF file's config.
      config_from_hf: translates a parsed config.json; its second argument names the file in error messages. Raises a
        `UserError` for a field that is missing, wrong or unknown.
      layer_weights: Hugging Face name of a layer's tensor -> the parameters of the decoder's layer that its rows fill,
        in order. Parameters that a config does not use, such as biases, are skipped.
      gguf_architecture: `general.architecture` of the GGUF files that are read as this family. None if there are no
        such files, or if they use another family's architecture.
      gguf_implies: `ModelConfig` fields that the architecture fixes and the metadata does not contain.
      gguf_interleaved_rotary: whether GGUF files store each head's query and key rows with the rotated pairs side by
        side, (0, E/2, 1, E/2 + 1, ...), not in halves. No tensor then mixes queries or keys with anything else.
      gguf_keeps_space: in sentencepiece tokenizers of its GGUF files, special tokens absorb the white space after
        them, except these. None if no token absorbs it.
    """

    model_types: tuple[str, ...]
    config_from_hf: Callable[[Mapping[str, Any], str], ModelConfig]
    layer_weights: Mapping[str, tuple[str, ...]]
    gguf_architecture: str | None = None
    gguf_implies: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gguf_interleaved_rotary: bool = False
    gguf_keeps_space: frozenset[str] | None = None
