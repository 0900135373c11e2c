"""The registry of model families, and the tensors that their checkpoints hold."""

from gemfilter_jax.config import ModelConfig
from gemfilter_jax.models.families import llama, mistral, phi, qwen
from gemfilter_jax.models.families.family import Family

_REGISTERED = (
    llama.FAMILY,
    mistral.FAMILY,
    phi.FAMILY,
    qwen.QWEN2,
    qwen.QWEN3,
)
FAMILIES: dict[str, Family] = {model_type: family for family in _REGISTERED for model_type in family.model_types}
"""The family of each Hugging Face `model_type`."""

_MODEL_WEIGHTS = {
    "model.embed_tokens.weight": ("embedding",),
    "model.norm.weight": ("final_norm.scale",),
    "lm_head.weight": ("lm_head.kernel",),
}
# Written into old checkpoints by mistake, never read: the same numbers follow from the config.
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"


def by_gguf_architecture() -> dict[str, Family]:
    """The family of each `general.architecture` of GGUF files."""
    return {family.gguf_architecture: family for family in FAMILIES.values() if family.gguf_architecture}


def tensors(config: ModelConfig) -> dict[str, tuple[int | None, tuple[str, ...]]]:
    """Every tensor that a checkpoint of this family and size may hold, under its Hugging Face name.

    Returns:
      tensor name -> its layer (None if it belongs to no layer) and the parameters that its rows fill, in order.
    """
    found: dict[str, tuple[int | None, tuple[str, ...]]] = {}
    for name, targets in _MODEL_WEIGHTS.items():
        found[name] = None, targets
    for layer in range(config.layers):
        for name, targets in FAMILIES[config.family].layer_weights.items():
            found[f"model.layers.{layer}.{name}"] = layer, targets
    return found


def is_leftover(name: str, config: ModelConfig) -> bool:
    """Whether a tensor may be in a checkpoint although nothing reads it."""
    return name.endswith(_IGNORED_SUFFIX) or (config.tie_embeddings and name == "lm_head.weight")
