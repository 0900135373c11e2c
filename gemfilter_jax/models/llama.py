"""The Llama family (Llama 2, 3, 3.1, 3.2, SmolLM2 and kin): config translation and weight names."""

from collections.abc import Mapping
from typing import Any

from gemfilter_jax.config import LinearRope, Llama3Rope, ModelConfig, RopeScaling, refuse_unknown, take
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
    heads = take(fields, "num_attention_heads", source)
    width = take(fields, "hidden_size", source)
    rope = fields.get("rope_parameters") or {}
    theta = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
    scaling = rope if rope.get("rope_type", "default") != "default" else fields.get("rope_scaling")
    return ModelConfig(
        family="llama",
        layers=take(fields, "num_hidden_layers", source),
        width=width,
        heads=heads,
        kv_heads=fields.get("num_key_value_heads") or heads,
        head_width=fields.get("head_dim") or width // heads,
        mlp_width=take(fields, "intermediate_size", source),
        vocab=take(fields, "vocab_size", source),
        context=take(fields, "max_position_embeddings", source),
        rms_eps=fields.get("rms_norm_eps", 1e-6),
        rope_theta=float(theta),
        rope_scaling=_rope_scaling(scaling, source),
        tie_embeddings=fields.get("tie_word_embeddings", False),
        attention_bias=fields.get("attention_bias", False),
        mlp_bias=fields.get("mlp_bias", False),
        activation=fields.get("hidden_act", "silu"),
    )


def _rope_scaling(fields: Mapping[str, Any] | None, source: str) -> RopeScaling | None:
    if not fields:
        return None
    kind = fields.get("rope_type", fields.get("type", "default"))
    match kind:
        case "default":
            return None
        case "linear":
            return LinearRope(float(take(fields, "factor", source)))
        case "llama3":
            return Llama3Rope(
                factor=float(take(fields, "factor", source)),
                low_freq_factor=float(take(fields, "low_freq_factor", source)),
                high_freq_factor=float(take(fields, "high_freq_factor", source)),
                original_context=take(fields, "original_max_position_embeddings", source),
            )
    raise UserError(f"{source}: rope type {kind!r} is not supported; supported: default, linear, llama3")


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
