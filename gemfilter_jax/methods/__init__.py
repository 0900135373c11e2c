"""What to keep of a prompt: one class in one file for each method."""

from typing import TYPE_CHECKING, Any

from gemfilter_jax.methods.base import Method
from gemfilter_jax.methods.bm25 import BM25
from gemfilter_jax.methods.fastkv import FastKV
from gemfilter_jax.methods.first_last import FirstLast
from gemfilter_jax.methods.full import Full
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.methods.h2o import H2O
from gemfilter_jax.methods.random_passages import RandomPassages
from gemfilter_jax.methods.snapkv import SnapKV
from gemfilter_jax.methods.streaming_llm import StreamingLLM

if TYPE_CHECKING:
    from gemfilter_jax.methods.presets import Preset

METHODS: tuple[type[Method], ...] = (
    Full,
    GemFilter,
    FastKV,
    SnapKV,
    H2O,
    StreamingLLM,
    BM25,
    FirstLast,
    RandomPassages,
)

VARIANTS: dict[str, type[Method]] = {variant: method for method in METHODS for variant in method.variants}
"""Methods by the names of their variants."""


def make(variant: str, preset: "Preset", **given: Any) -> Method:
    """A variant of a method for a model; see `Method.of`."""
    return VARIANTS[variant].of(variant, preset, **given)
