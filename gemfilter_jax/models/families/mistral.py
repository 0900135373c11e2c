"""The Mistral family (7B v0.1 to v0.3, Nemo, Ministral): Llama with a sliding window in all, some or no layers."""

from collections.abc import Mapping
from typing import Any

from gemfilter_jax.config import ModelConfig, take_layers
from gemfilter_jax.models.families import hf_config, llama
from gemfilter_jax.models.families.family import Family

# Defaults of absent fields where they differ from other families.
_ABSENT = {"sliding_window": 4096, "num_key_value_heads": 8}


def config_from_hf(fields: Mapping[str, Any], source: str) -> ModelConfig:
    """Translate the parsed config.json of a `MistralForCausalLM` or `MinistralForCausalLM`."""
    fields = _ABSENT | dict(fields)
    if fields["model_type"] == "mistral":
        fields.pop("layer_types", None)  # Hugging Face's Mistral ignores it
    slides = [True] * take_layers(fields, "num_hidden_layers", source)
    return hf_config.model_config(
        fields,
        source,
        also_read={"sliding_window", "layer_types"},
        sliding_windows=hf_config.sliding_windows(fields, source, slides=slides),
    )


# GGUF files store Mistral models under the Llama architecture.
FAMILY = Family(
    model_types=("mistral", "ministral"),
    config_from_hf=config_from_hf,
    layer_weights=llama.LAYER_WEIGHTS,
)
