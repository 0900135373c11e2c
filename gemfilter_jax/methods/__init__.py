"""What to keep of a prompt: one class in one file for each method."""

from typing import TYPE_CHECKING, Any

from gemfilter_jax.methods.base import Method
from gemfilter_jax.methods.full import Full
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.methods.streaming_llm import StreamingLLM

if TYPE_CHECKING:
    from gemfilter_jax.methods.presets import Preset

METHODS: tuple[type[Method], ...] = (Full, GemFilter, StreamingLLM)

VARIANTS: dict[str, type[Method]] = {variant: method for method in METHODS for variant in method.variants}
"""Methods by the names of their variants."""


def make(variant: str, preset: "Preset", **given: Any) -> Method:
    """A variant of a method for a model; see `Method.of`."""
    return VARIANTS[variant].of(variant, preset, **given)
