"""The Qwen family (Qwen2, 2.5 and 3): biased queries, keys and values, or normalised queries and keys."""

from collections.abc import Mapping
from typing import Any

from gemfilter_jax.config import ModelConfig, take, take_count, take_flag, take_layers
from gemfilter_jax.errors import UserError
from gemfilter_jax.models.families import hf_config, llama

# use_mrope is for images; max_window_layers and use_sliding_window say which layers slide.
_FIELDS = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "use_mrope", "attention_bias"}

LAYER_WEIGHTS = llama.LAYER_WEIGHTS | {
    "self_attn.q_norm.weight": ("query_norm.scale",),
    "self_attn.k_norm.weight": ("key_norm.scale",),
}


def config_from_hf(fields: Mapping[str, Any], source: str) -> ModelConfig:
    """Translate the parsed config.json of a `Qwen2ForCausalLM` or `Qwen3ForCausalLM`."""
    fields = {"num_key_value_heads": 32, "sliding_window": 4096} | dict(fields)
    if fields.get("use_mrope"):
        raise UserError(f"{source}: use_mrope true is not supported, only false")
    third = fields["model_type"] == "qwen3"
    bias = take_flag(fields, "attention_bias", source) if third else False
    return hf_config.model_config(
        fields,
        source,
        also_read=_FIELDS,
        sliding_windows=_windows(fields, source),
        attention_bias=bias or not third,
        output_bias=bias,
        qk_norm=third,
        **({"head_width": take_count(fields, "head_dim", source, 128)} if third else {}),
    )


def _windows(fields: Mapping[str, Any], source: str) -> tuple[int | None, ...] | None:
    """Layers from `max_window_layers` on slide, if any do."""
    if not take_flag(fields, "use_sliding_window", source):
        return None
    first = take(fields, "max_window_layers", source, 28)
    layers = take_layers(fields, "num_hidden_layers", source)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise UserError(f"{source}: field 'max_window_layers' is {first!r}, expected a whole number")
    return hf_config.sliding_windows(fields, source, slides=[layer >= first for layer in range(layers)])
