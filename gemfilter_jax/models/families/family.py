"""What a model family is: how its configs are read and under which names its checkpoints hold the weights."""

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
        in order. Parameters that a config has no use for, such as biases, are skipped.
      gguf_architecture: `general.architecture` of the GGUF files that are read as this family. None if there are no
        such files, or if they are stored as another family's.
      gguf_implies: `ModelConfig` fields that the architecture decides and no metadata says.
      gguf_interleaved_rotary: GGUF files hold each head's query and key rows with the rotated pairs side by side,
        (0, E/2, 1, E/2 + 1, ...), not in halves. A tensor then holds queries or keys and nothing else.
    """

    model_types: tuple[str, ...]
    config_from_hf: Callable[[Mapping[str, Any], str], ModelConfig]
    layer_weights: Mapping[str, tuple[str, ...]]
    gguf_architecture: str | None = None
    gguf_implies: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gguf_interleaved_rotary: bool = False
