"""ModelConfig: everything about a model that changes its numbers, read from config.json or GGUF metadata.

A field that changes the numbers and is not understood is an error here, never a default.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from gemfilter_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Rotary scaling of Llama 3.1 and later: long wavelengths slowed by `factor`, short ones kept, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclasses.dataclass(frozen=True)
class LinearRope:
    """Rotary scaling by position interpolation: every frequency divided by `factor`."""

    factor: float


@dataclasses.dataclass(frozen=True)
class FactorRope:
    """Rotary scaling by a table: frequency i divided by `factors[i]`. GGUF stores Llama 3.1's scaling in this form."""

    factors: tuple[float, ...]


RopeScaling = Llama3Rope | LinearRope | FactorRope


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape and numerics. Hashable, so that it can be a static argument of a compiled program.

    Attributes:
      family: architecture name as Hugging Face's `model_type` spells it.
      layers: L. width: D. heads: H. kv_heads: G. head_width: E. mlp_width: F. vocab: V.
      context: the longest prompt plus answer, in tokens, that the model was trained for.
      activation: name of the MLP's gate activation, see `models.decoder.ACTIVATIONS`.
    """

    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    vocab: int
    context: int
    rms_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise UserError(
                f"model config: {self.heads} query heads cannot share {self.kv_heads} key/value heads evenly"
            )
        if self.head_width % 2:
            raise UserError(f"model config: head width {self.head_width} is odd, rotary embedding needs an even one")
        if isinstance(self.rope_scaling, FactorRope) and len(self.rope_scaling.factors) != self.head_width // 2:
            raise UserError(
                f"model config: {len(self.rope_scaling.factors)} rope factors, expected {self.head_width // 2}, "
                f"half the head width"
            )


def take(fields: Mapping[str, Any], name: str, source: str, default: Any = None) -> Any:
    """A field, or `default`, or a `UserError` that names the field and where it was looked for."""
    value = fields.get(name)
    if value is None:
        value = default
    if value is None:
        raise UserError(f"{source}: field {name!r} is missing")
    return value


def take_count(fields: Mapping[str, Any], name: str, source: str, default: int | None = None) -> int:
    """As `take`, for a whole number of at least 1."""
    value = take(fields, name, source, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{source}: field {name!r} is {value!r}, expected a whole number of at least 1")
    return value


def take_positive(fields: Mapping[str, Any], name: str, source: str, default: float | None = None) -> float:
    """As `take`, for a number above 0."""
    value = take(fields, name, source, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{source}: field {name!r} is {value!r}, expected a number above 0")
    return float(value)


def take_flag(fields: Mapping[str, Any], name: str, source: str) -> bool:
    """A field that is true or false, false if it is missing."""
    value = take(fields, name, source, False)
    if not isinstance(value, bool):
        raise UserError(f"{source}: field {name!r} is {value!r}, expected true or false")
    return value


def refuse_unknown(fields: Mapping[str, Any], known: set[str], source: str) -> None:
    """Raise a `UserError` when `fields` holds a name that nobody here reads or knows to be harmless."""
    unknown = sorted(set(fields) - known)
    if unknown:
        raise UserError(f"{source}: unsupported field(s) {', '.join(unknown)}; they may change the model's numbers")
