"""The Phi family (Phi-3, 3.5 and 4 mini): fused weights, LongRoPE, partial rotary embedding."""

from collections.abc import Mapping
from typing import Any

from gemfilter_jax.config import ModelConfig, refuse_unknown, take_layers
from gemfilter_jax.models.families import hf_config, llama
from gemfilter_jax.models.families.family import Family

_HARMLESS = {"embd_pdrop", "resid_pdrop"}
# Fields in Phi-4-mini's config that only other models of its code use; other values would change results.
_ONLY = {
    "attention_bias": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
}

_SEPARATE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
_LAYER_WEIGHTS = {
    **{name: target for name, target in llama.LAYER_WEIGHTS.items() if not name.startswith(_SEPARATE)},
    "self_attn.qkv_proj.weight": ("query.kernel", "key.kernel", "value.kernel"),
    "mlp.gate_up_proj.weight": ("gate.kernel", "up.kernel"),
}


def config_from_hf(fields: Mapping[str, Any], source: str) -> ModelConfig:
    """Translate the parsed config.json of a `Phi3ForCausalLM`."""
    fields = {"rms_norm_eps": 1e-5} | dict(fields)
    changed = {name for name, value in _ONLY.items() if fields.get(name, value) != value}
    refuse_unknown(dict.fromkeys(changed), set(), source)
    slides = [True] * take_layers(fields, "num_hidden_layers", source)
    return hf_config.model_config(
        fields,
        source,
        also_read={"sliding_window", "original_max_position_embeddings", "partial_rotary_factor", *_HARMLESS, *_ONLY},
        sliding_windows=hf_config.sliding_windows(fields, source, slides=slides),
    )


FAMILY = Family(
    model_types=("phi3",),
    config_from_hf=config_from_hf,
    layer_weights=_LAYER_WEIGHTS,
    gguf_architecture="phi3",
    gguf_keeps_space=frozenset({"<unk>", "<s>", "<|endoftext|>"}),
)
