"""Translation of the config.json fields that all families share to a ModelConfig."""

import math
from collections.abc import Mapping
from typing import Any

from gemfilter_jax.config import (
    LinearRope,
    Llama3Rope,
    LongRope,
    ModelConfig,
    RopeScaling,
    YarnRope,
    refuse_unknown,
    take,
    take_count,
    take_flag,
    take_layers,
    take_numbers,
    take_positive,
)
from gemfilter_jax.errors import UserError

_READ = {
    "model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "tie_word_embeddings", "hidden_act",
}  # fmt: skip
# Fields that do not change what an inference pass computes.
_HARMLESS = {
    "architectures", "auto_map", "_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype",
    "use_cache", "initializer_range", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
    "transformers.js_config", "unsloth_version", "unsloth_fixed", "_commit_hash", "output_hidden_states",
    "output_attentions", "return_dict", "id2label", "label2id", "chunk_size_feed_forward", "is_encoder_decoder",
    "problem_type", "_attn_implementation", "_attn_implementation_autoset",
}  # fmt: skip


def model_config(fields: Mapping[str, Any], source: str, *, also_read: set[str], **of_family: Any) -> ModelConfig:
    """Translate a parsed config.json.

    Args:
      fields: the config. source: names the file in error messages.
      also_read: fields that the family reads itself or knows to be harmless.
      of_family: `ModelConfig` fields that the family sets.

    Raises:
      UserError: a field is missing, wrong, or not understood.
    """
    refuse_unknown(fields, _READ | _HARMLESS | also_read, source)
    heads = take_count(fields, "num_attention_heads", source)
    width = take_count(fields, "hidden_size", source)
    if fields.get("head_dim") is None and width % heads:
        raise UserError(f"{source}: hidden_size {width} is no multiple of num_attention_heads {heads}")
    head_width = take_count(fields, "head_dim", source, max(width // heads, 1))
    context = take_count(fields, "max_position_embeddings", source)
    rope = rope_fields(fields, source)
    activation = take(fields, "hidden_act", source, "silu")
    if not isinstance(activation, str):
        raise UserError(f"{source}: field 'hidden_act' is {activation!r}, expected a name")
    return ModelConfig(
        **{
            "family": fields["model_type"],
            "layers": take_layers(fields, "num_hidden_layers", source),
            "width": width,
            "heads": heads,
            "kv_heads": take_count(fields, "num_key_value_heads", source, heads),
            "head_width": head_width,
            "mlp_width": take_count(fields, "intermediate_size", source),
            "vocab": take_count(fields, "vocab_size", source),
            "context": context,
            "rms_eps": take_positive(fields, "rms_norm_eps", source, 1e-6),
            "rope_theta": take_positive(rope, "rope_theta", source, 10000.0),
            "rope_scaling": _rope_scaling(rope, context, source),
            "rotary_width": _rotary_width(rope, head_width, source),
            "tie_embeddings": take_flag(fields, "tie_word_embeddings", source),
            "activation": activation,
            **of_family,
        }
    )


def rope_fields(fields: Mapping[str, Any], source: str) -> dict[str, Any]:
    """All rotary embedding fields in one mapping, the form of `rope_parameters` since transformers 5.

    Older configs have `rope_theta` and `partial_rotary_factor` at the top level and the rest in `rope_scaling`.
    """
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(fields.get(name) or {}, Mapping):
            raise UserError(f"{source}: field {name!r} is {fields[name]!r}, expected an object")
    top = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    given = {name: fields[name] for name in top if fields.get(name) is not None}
    return given | dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})


def _rotary_width(rope: Mapping[str, Any], head_width: int, source: str) -> int | None:
    share = take_positive(rope, "partial_rotary_factor", source, 1.0)
    if share > 1:
        raise UserError(f"{source}: field 'partial_rotary_factor' is {share}, expected at most 1")
    return None if share == 1.0 else int(head_width * share)


# The fields that each type of rotary scaling reads, besides those of all types.
_ROPE_FIELDS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "longrope": {"short_factor", "long_factor", "factor", "attention_factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "truncate"},
}
_OF_ALL_TYPES = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}


def _rope_scaling(rope: Mapping[str, Any], context: int, source: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "su" or (kind == "yarn" and "short_factor" in rope):  # names of the first Phi-3 configs
        kind = "longrope"
    if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
        raise UserError(f"{source}: rope type {kind!r} is not supported; supported: {', '.join(_ROPE_FIELDS)}")
    source = f"{source} (rope type {kind})"
    refuse_unknown(rope, _OF_ALL_TYPES | _ROPE_FIELDS[kind], source)
    match kind:
        case "linear":
            return LinearRope(take_positive(rope, "factor", source))
        case "llama3":
            return Llama3Rope(
                factor=take_positive(rope, "factor", source),
                low_freq_factor=take_positive(rope, "low_freq_factor", source),
                high_freq_factor=take_positive(rope, "high_freq_factor", source),
                original_context=take_count(rope, "original_max_position_embeddings", source),
            )
        case "longrope":
            original = take_count(rope, "original_max_position_embeddings", source)
            factor = take_positive(rope, "factor", source, context / original)
            return LongRope(
                short_factors=take_numbers(rope, "short_factor", source),
                long_factors=take_numbers(rope, "long_factor", source),
                original_context=original,
                attention_scaling=take_positive(
                    rope, "attention_factor", source, longrope_attention_scaling(factor, original)
                ),
            )
        case "yarn":
            factor = take_positive(rope, "factor", source)
            return YarnRope(
                factor=factor,
                original_context=take_count(rope, "original_max_position_embeddings", source, context),
                attention_scaling=take_positive(rope, "attention_factor", source, yarn_attention_scaling(factor)),
                beta_fast=take_positive(rope, "beta_fast", source, 32.0),
                beta_slow=take_positive(rope, "beta_slow", source, 1.0),
                truncate=True if rope.get("truncate") is None else take_flag(rope, "truncate", source),
            )
    return None


def longrope_attention_scaling(factor: float, original_context: int) -> float:
    """The multiplier of cosines and sines when the context grows by `factor` (LongRoPE)."""
    if original_context < 2:
        raise UserError(f"model config: LongRoPE extends a context of {original_context}, expected at least 2")
    return math.sqrt(1 + math.log(factor) / math.log(original_context)) if factor > 1 else 1.0


def yarn_attention_scaling(factor: float) -> float:
    """The multiplier of cosines and sines when the context grows by `factor` (YaRN)."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def sliding_windows(fields: Mapping[str, Any], source: str, *, slides: list[bool]) -> tuple[int | None, ...] | None:
    """Each layer's sliding window, None for a layer without one; None for the whole tuple if no layer slides.

    Args:
      slides: for each layer, whether it slides; `layer_types` in the config overrides this.
    """
    types = fields.get("layer_types")
    if types is not None:
        known = {"sliding_attention": True, "full_attention": False}
        if not isinstance(types, list) or len(types) != len(slides) or not all(kind in list(known) for kind in types):
            raise UserError(
                f"{source}: field 'layer_types' must name one of {', '.join(known)} for each of {len(slides)} layers"
            )
        slides = [known[kind] for kind in types]
    if fields.get("sliding_window") is None or not any(slides):
        return None
    window = take_count(fields, "sliding_window", source)
    return tuple(window if sliding else None for sliding in slides)
