"""The Llama family (Llama 2, 3, 3.1, 3.2, SmolLM2 and kin): config translation and weight names."""

from collections.abc import Mapping
from typing import Any

from gemfilter_jax.config import ModelConfig, take_flag
from gemfilter_jax.errors import UserError
from gemfilter_jax.models.families import hf_config
from gemfilter_jax.models.families.family import Family

# pretraining_tp only splits matrix products; their results are the same.
_FIELDS = {"attention_bias", "mlp_bias", "pretraining_tp", "is_llama_config", "rope_interleaved"}


def config_from_hf(fields: Mapping[str, Any], source: str) -> ModelConfig:
    """Translate the parsed config.json of a `LlamaForCausalLM`; `source` names the file in error messages."""
    if fields.get("rope_interleaved"):
        raise UserError(f"{source}: rope_interleaved true is not supported, only false")
    bias = take_flag(fields, "attention_bias", source)
    return hf_config.model_config(
        fields,
        source,
        also_read=_FIELDS,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=take_flag(fields, "mlp_bias", source),
    )


# Hugging Face name of a layer's tensor -> the parameters of the decoder's layer that its rows fill, in order.
LAYER_WEIGHTS = {
    "input_layernorm.weight": ("attention_norm.scale",),
    "self_attn.q_proj.weight": ("query.kernel",),
    "self_attn.k_proj.weight": ("key.kernel",),
    "self_attn.v_proj.weight": ("value.kernel",),
    "self_attn.o_proj.weight": ("output.kernel",),
    "self_attn.q_proj.bias": ("query.bias",),
    "self_attn.k_proj.bias": ("key.bias",),
    "self_attn.v_proj.bias": ("value.bias",),
    "self_attn.o_proj.bias": ("output.bias",),
    "post_attention_layernorm.weight": ("mlp_norm.scale",),
    "mlp.gate_proj.weight": ("gate.kernel",),
    "mlp.up_proj.weight": ("up.kernel",),
    "mlp.down_proj.weight": ("down.kernel",),
    "mlp.gate_proj.bias": ("gate.bias",),
    "mlp.up_proj.bias": ("up.bias",),
    "mlp.down_proj.bias": ("down.bias",),
}

FAMILY = Family(
    model_types=("llama",),
    config_from_hf=config_from_hf,
    layer_weights=LAYER_WEIGHTS,
    gguf_architecture="llama",
    gguf_interleaved_rotary=True,
)
