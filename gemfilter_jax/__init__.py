"""GemFilter in JAX: a language model's own early layers pick the few tokens of a long prompt that its answer needs.

import gemfilter_jax

model = gemfilter_jax.load("smollm2")
result = model.generate(long_text, "What is the password?")
result.text, result.selection.passages, result.timings
"""

import importlib

_HOMES = {
    "load": "pipeline",
    "Pipeline": "pipeline",
    "Document": "pipeline",
    "Result": "pipeline",
    "KeptText": "pipeline",
    "GemFilter": "methods",
    "Full": "methods",
    "Sampling": "sampling",
    "ModelConfig": "config",
    "Decoder": "models.decoder",
    "UserError": "errors",
}
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    """Import a public name when it is first used, so that `import gemfilter_jax` stays instant."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
