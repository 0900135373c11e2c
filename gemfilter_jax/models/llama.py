"""The Llama family (Llama 2, 3, 3.1, 3.2, SmolLM2 and kin): config translation and weight names."""

from collections.abc import Mapping
from typing import Any

from gemfilter_jax.config import (
    LinearRope,
    Llama3Rope,
    ModelConfig,
    RopeScaling,
    refuse_unknown,
    take,
    take_count,
    take_flag,
    take_positive,
)
from gemfilter_jax.errors import UserError

# Fields of a Hugging Face config.json that are read below.
_READ = {
    "model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act",
}  # fmt: skip
# Fields that do not change what an inference pass computes. pretraining_tp only splits the same products.
_HARMLESS = {
    "architectures", "_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache",
    "initializer_range", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp",
    "is_llama_config", "rope_interleaved", "transformers.js_config", "unsloth_version", "unsloth_fixed", "_commit_hash",
    "output_hidden_states", "output_attentions", "return_dict", "id2label", "label2id", "chunk_size_feed_forward",
    "is_encoder_decoder", "problem_type",
}  # fmt: skip


def config_from_hf(fields: Mapping[str, Any], source: str) -> ModelConfig:
    """Translate the parsed config.json of a `LlamaForCausalLM`; `source` names the file in error messages."""
    refuse_unknown(fields, _READ | _HARMLESS, source)
    if fields.get("rope_interleaved"):
        raise UserError(f"{source}: rope_interleaved true is not supported, only false")
    heads = take_count(fields, "num_attention_heads", source)
    width = take_count(fields, "hidden_size", source)
    if fields.get("head_dim") is None and width % heads:
        raise UserError(f"{source}: hidden_size {width} is no multiple of num_attention_heads {heads}")
    rope = take(fields, "rope_parameters", source, {})
    if not isinstance(rope, Mapping):
        raise UserError(f"{source}: field 'rope_parameters' is {rope!r}, expected an object")
    scaling = rope or take(fields, "rope_scaling", source, {})
    return ModelConfig(
        family="llama",
        layers=take_count(fields, "num_hidden_layers", source),
        width=width,
        heads=heads,
        kv_heads=take_count(fields, "num_key_value_heads", source, heads),
        head_width=take_count(fields, "head_dim", source, max(width // heads, 1)),
        mlp_width=take_count(fields, "intermediate_size", source),
        vocab=take_count(fields, "vocab_size", source),
        context=take_count(fields, "max_position_embeddings", source),
        rms_eps=take_positive(fields, "rms_norm_eps", source, 1e-6),
        rope_theta=take_positive(rope if "rope_theta" in rope else fields, "rope_theta", source, 10000.0),
        rope_scaling=_rope_scaling(scaling, source),
        tie_embeddings=take_flag(fields, "tie_word_embeddings", source),
        attention_bias=take_flag(fields, "attention_bias", source),
        mlp_bias=take_flag(fields, "mlp_bias", source),
        activation=take(fields, "hidden_act", source, "silu"),
    )


# What each type of rotary scaling reads, besides its own name and rope_theta.
_ROPE_FIELDS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def _rope_scaling(fields: Mapping[str, Any], source: str) -> RopeScaling | None:
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind not in _ROPE_FIELDS:
        raise UserError(f"{source}: rope type {kind!r} is not supported; supported: {', '.join(_ROPE_FIELDS)}")
    source = f"{source} (rope type {kind})"
    refuse_unknown(fields, {"rope_type", "type", "rope_theta"} | _ROPE_FIELDS[kind], source)
    if kind == "default":
        return None
    factor = take_positive(fields, "factor", source)
    if kind == "linear":
        return LinearRope(factor)
    return Llama3Rope(
        factor=factor,
        low_freq_factor=take_positive(fields, "low_freq_factor", source),
        high_freq_factor=take_positive(fields, "high_freq_factor", source),
        original_context=take_count(fields, "original_max_position_embeddings", source),
    )


# A Hugging Face tensor name (with {layer} standing for the layer's number) and the decoder's parameter it fills.
# Two-dimensional kernels are stored [out, in] there and [in, out] here.
MODEL_WEIGHTS = {
    "model.embed_tokens.weight": ("embedding",),
    "model.norm.weight": ("final_norm", "scale"),
    "lm_head.weight": ("lm_head", "kernel"),
}
LAYER_WEIGHTS = {
    "model.layers.{layer}.input_layernorm.weight": ("attention_norm", "scale"),
    "model.layers.{layer}.self_attn.q_proj.weight": ("query", "kernel"),
    "model.layers.{layer}.self_attn.k_proj.weight": ("key", "kernel"),
    "model.layers.{layer}.self_attn.v_proj.weight": ("value", "kernel"),
    "model.layers.{layer}.self_attn.o_proj.weight": ("output", "kernel"),
    "model.layers.{layer}.self_attn.q_proj.bias": ("query", "bias"),
    "model.layers.{layer}.self_attn.k_proj.bias": ("key", "bias"),
    "model.layers.{layer}.self_attn.v_proj.bias": ("value", "bias"),
    "model.layers.{layer}.self_attn.o_proj.bias": ("output", "bias"),
    "model.layers.{layer}.post_attention_layernorm.weight": ("mlp_norm", "scale"),
    "model.layers.{layer}.mlp.gate_proj.weight": ("gate", "kernel"),
    "model.layers.{layer}.mlp.up_proj.weight": ("up", "kernel"),
    "model.layers.{layer}.mlp.down_proj.weight": ("down", "kernel"),
    "model.layers.{layer}.mlp.gate_proj.bias": ("gate", "bias"),
    "model.layers.{layer}.mlp.up_proj.bias": ("up", "bias"),
    "model.layers.{layer}.mlp.down_proj.bias": ("down", "bias"),
}
# Written into old checkpoints by mistake, never read: the same numbers follow from the config.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
