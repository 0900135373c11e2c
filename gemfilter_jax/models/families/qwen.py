"""The Qwen families (Qwen2, 2.5 and 3): biased queries, keys and values, or normalised queries and keys."""

from collections.abc import Mapping
from typing import Any

from gemfilter_jax.config import ModelConfig, take, take_count, take_flag, take_layers
from gemfilter_jax.errors import UserError
from gemfilter_jax.models.families import hf_config, llama
from gemfilter_jax.models.families.family import Family

# use_mrope is for images; max_window_layers and use_sliding_window say which layers slide.
_FIELDS = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "use_mrope", "attention_bias"}


def _qwen2_config(fields: Mapping[str, Any], source: str) -> ModelConfig:
    """Translate the parsed config.json of a `Qwen2ForCausalLM`, whose queries, keys and values always have biases."""
    return _config(fields, source, attention_bias=True)


def _qwen3_config(fields: Mapping[str, Any], source: str) -> ModelConfig:
    """Translate the parsed config.json of a `Qwen3ForCausalLM`."""
    bias = take_flag(fields, "attention_bias", source)
    head_width = take_count(fields, "head_dim", source, 128)
    return _config(fields, source, attention_bias=bias, output_bias=bias, qk_norm=True, head_width=head_width)


def _config(fields: Mapping[str, Any], source: str, **of_family: Any) -> ModelConfig:
    fields = {"num_key_value_heads": 32, "sliding_window": 4096} | dict(fields)
    if fields.get("use_mrope"):
        raise UserError(f"{source}: use_mrope true is not supported, only false")
    windows = _windows(fields, source)
    return hf_config.model_config(fields, source, also_read=_FIELDS, sliding_windows=windows, **of_family)


def _windows(fields: Mapping[str, Any], source: str) -> tuple[int | None, ...] | None:
    """Each layer's sliding window: layers from `max_window_layers` on slide if `use_sliding_window` is true."""
    if not take_flag(fields, "use_sliding_window", source):
        return None
    first = take(fields, "max_window_layers", source, 28)
    layers = take_layers(fields, "num_hidden_layers", source)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise UserError(f"{source}: field 'max_window_layers' is {first!r}, expected a whole number")
    return hf_config.sliding_windows(fields, source, slides=[layer >= first for layer in range(layers)])


QWEN2 = Family(
    model_types=("qwen2",),
    config_from_hf=_qwen2_config,
    layer_weights=llama.LAYER_WEIGHTS,
    gguf_architecture="qwen2",
    gguf_implies={"attention_bias": True},
)
QWEN3 = Family(
    model_types=("qwen3",),
    config_from_hf=_qwen3_config,
    layer_weights=llama.LAYER_WEIGHTS
    | {
        "self_attn.q_norm.weight": ("query_norm.scale",),
        "self_attn.k_norm.weight": ("key_norm.scale",),
    },
    gguf_architecture="qwen3",
    gguf_implies={"qk_norm": True},
)
