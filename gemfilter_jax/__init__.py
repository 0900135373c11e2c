"""GemFilter in JAX: a language model's own early layers pick the few tokens of a long prompt that its answer needs.

import gemfilter_jax

model = gemfilter_jax.load("smollm2")
result = model.generate(long_text, "What is the password?")
result.text, result.selection.passages, result.timings
"""

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemfilter_jax.config import ModelConfig as ModelConfig
    from gemfilter_jax.errors import UserError as UserError
    from gemfilter_jax.generate.sampling import Sampling as Sampling
    from gemfilter_jax.methods.full import Full as Full
    from gemfilter_jax.methods.gemfilter.method import GemFilter as GemFilter
    from gemfilter_jax.models.transformer import Decoder as Decoder
    from gemfilter_jax.pipeline import Document as Document
    from gemfilter_jax.pipeline import Pipeline as Pipeline
    from gemfilter_jax.pipeline import load as load
    from gemfilter_jax.results import KeptText as KeptText
    from gemfilter_jax.results import Result as Result

# transformers advises at import to install PyTorch, which is not needed here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_HOMES = {
    "load": "pipeline",
    "Pipeline": "pipeline",
    "Document": "pipeline",
    "Result": "results",
    "KeptText": "results",
    "GemFilter": "methods.gemfilter.method",
    "Full": "methods.full",
    "Sampling": "generate.sampling",
    "ModelConfig": "config",
    "Decoder": "models.transformer",
    "UserError": "errors",
}
__all__ = [
    "Decoder",
    "Document",
    "Full",
    "GemFilter",
    "KeptText",
    "ModelConfig",
    "Pipeline",
    "Result",
    "Sampling",
    "UserError",
    "load",
]


def __getattr__(name: str):
    """Import a public name when it is first used, so that `import gemfilter_jax` stays instant."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
