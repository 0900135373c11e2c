"""ModelConfig: all settings of a model that affect its outputs, read from config.json or GGUF metadata.

An unsupported field that affects the outputs is an error; it is never ignored.
"""

import builtins
import dataclasses
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from gemfilter_jax.errors import UserError
from gemfilter_jax.settings import LARGEST_COUNT


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Rotary scaling of Llama 3.1 and later: low frequencies divided by `factor`, high ones kept, a ramp between."""

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


@dataclasses.dataclass(frozen=True)
class LongRope:
    """Rotary scaling by one of two tables (Phi-3 128K, 3.5 and 4; LongRoPE, arXiv 2402.13753).

    Frequency i is divided by `short_factors[i]` in sequences of up to `original_context` tokens and by
    `long_factors[i]` in longer ones. Cosines and sines are always multiplied by `attention_scaling`.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_context: int
    attention_scaling: float


@dataclasses.dataclass(frozen=True)
class YarnRope:
    """Rotary scaling of long-context Qwen and Ministral (YaRN, arXiv 2309.00071).

    Frequencies that turn fewer than `beta_slow` times in `original_context` tokens are divided by `factor`. Those that
    turn more than `beta_fast` times are kept. Between them lies a ramp, whose ends are rounded to whole numbers if
    `truncate`. Cosines and sines are multiplied by `attention_scaling`.
    """

    factor: float
    original_context: int
    attention_scaling: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


_SMALLEST, _LARGEST = 2.0**-126, 2.0**127  # range of real numbers: programs compute in float32
_MOST_LAYERS = 10_000  # lists of layers are built before the tensors can confirm their number
_LONGEST_SHOWN = 1000  # characters of a list of names in an error message

RopeScaling = Llama3Rope | LinearRope | FactorRope | LongRope | YarnRope


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape and numerical settings. Hashable, so that it can be a static argument of a compiled program.

    Attributes:
      family: architecture name as Hugging Face's `model_type` spells it.
      layers: L. width: D. heads: H. kv_heads: G. head_width: E. mlp_width: F. vocab: V.
      context: the longest prompt plus answer, in tokens, that the model was trained for.
      rotary_width: number of elements at the start of each head that are rotated; None for all.
      sliding_windows: for each layer, the number of keys that a query attends to, its own included, or None for all;
        None if all layers attend to all keys.
      attention_bias: bias of the query, key and value projections. output_bias: bias of the output projection.
      qk_norm: whether each head of queries and keys is normalised before rotation.
      activation: name of the MLP's gate activation, see `models.layer.ACTIVATIONS`.
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
    rotary_width: int | None = None
    sliding_windows: tuple[int | None, ...] | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    activation: str = "silu"

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise UserError(
                f"model config: {self.heads} query heads cannot share {self.kv_heads} key/value heads evenly"
            )
        if self.rotated < 2 or self.rotated % 2:
            raise UserError(f"model config: {self.rotated} of a head are rotated, which must be an even number above 0")
        if self.rotated > self.head_width:
            raise UserError(f"model config: {self.rotated} of a head are rotated, but it is {self.head_width} wide")
        if self.sliding_windows is not None and len(self.sliding_windows) != self.layers:
            raise UserError(f"model config: {len(self.sliding_windows)} sliding windows for {self.layers} layers")
        match self.rope_scaling:
            case YarnRope() if self.rope_theta <= 1:
                raise UserError(f"model config: rope theta {self.rope_theta} with YaRN, which needs one above 1")
            case Llama3Rope(low_freq_factor=low, high_freq_factor=high) if low >= high:
                raise UserError(f"model config: low_freq_factor {low} is not below high_freq_factor {high}")
        for factors in self._factor_tables():
            if len(factors) != self.rotated // 2:
                raise UserError(
                    f"model config: {len(factors)} rope factors, expected {self.rotated // 2}, half of what is rotated"
                )

    @property
    def rotated(self) -> int:
        """Number of elements of each head that are rotated."""
        return self.head_width if self.rotary_width is None else self.rotary_width

    def reach(self, layer: int) -> int:
        """Number of tokens that the last query attends to in a layer: the sliding window, at most the context."""
        window = self.sliding_windows[layer] if self.sliding_windows else None
        return min(window or self.context, self.context)

    def _factor_tables(self) -> list[tuple[float, ...]]:
        match self.rope_scaling:
            case FactorRope(factors):
                return [factors]
            case LongRope() as scaling:
                return [scaling.short_factors, scaling.long_factors]
            case _:
                return []


def take(fields: Mapping[str, Any], name: str, source: str, default: Any = None) -> Any:
    """The value of a field, or `default`; raises a `UserError` with `source` and the field name if both are missing."""
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
        raise UserError(f"{source}: field {name!r} is {reprlib.repr(value)}, expected a whole number of at least 1")
    if value > LARGEST_COUNT:
        raise UserError(f"{source}: field {name!r} is {reprlib.repr(value)}, expected at most {LARGEST_COUNT:,}")
    return value


def take_layers(fields: Mapping[str, Any], name: str, source: str) -> int:
    """As `take_count`, for a number of layers."""
    value = take_count(fields, name, source)
    if value > _MOST_LAYERS:
        raise UserError(f"{source}: field {name!r} is {reprlib.repr(value)}, expected at most {_MOST_LAYERS:,}")
    return value


def take_positive(fields: Mapping[str, Any], name: str, source: str, default: float | None = None) -> float:
    """As `take`, for a number above 0."""
    value = take(fields, name, source, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not _SMALLEST <= value <= _LARGEST:
        raise UserError(
            f"{source}: field {name!r} is {reprlib.repr(value)}, expected a number above 0 within float32's range"
        )
    return float(value)


def take_flag(fields: Mapping[str, Any], name: str, source: str, default: bool = False) -> bool:
    """A field that is true or false, `default` if it is missing."""
    value = take(fields, name, source, default)
    if not isinstance(value, bool):
        raise UserError(f"{source}: field {name!r} is {reprlib.repr(value)}, expected true or false")
    return value


def take_name(fields: Mapping[str, Any], name: str, source: str, default: str | None = None) -> str:
    """As `take`, for a string."""
    value = take(fields, name, source, default)
    if not isinstance(value, str):
        raise UserError(f"{source}: field {name!r} is {reprlib.repr(value)}, expected a string")
    return value


def refuse_unknown(fields: Mapping[str, Any], known: set[str], source: str) -> None:
    """Raise a `UserError` if `fields` has a name that is neither read nor known to be harmless."""
    unknown = sorted(set(fields) - known)
    if unknown:
        names = ", ".join(unknown)[:_LONGEST_SHOWN]
        raise UserError(f"{source}: unsupported field(s) {names}; they may change the model's numbers")


def take_object(fields: Mapping[str, Any], name: str, source: str) -> Mapping[str, Any]:
    """As `take`, for an object."""
    value = take(fields, name, source)
    if not isinstance(value, Mapping):
        raise UserError(f"{source}: field {name!r} is {reprlib.repr(value)}, expected an object")
    return value


def take_list(fields: Mapping[str, Any], name: str, source: str, what: str) -> list:
    """As `take`, for a list; error messages call its items `what`."""
    values = take(fields, name, source)
    if not isinstance(values, list):
        raise UserError(f"{source}: field {name!r} is {reprlib.repr(values)}, expected a list of {what}")
    return values


def take_numbers(fields: Mapping[str, Any], name: str, source: str) -> tuple[float, ...]:
    """A field that is a list of numbers above 0."""
    values = take_list(fields, name, source, "numbers")
    return tuple(take_positive({name: value}, name, source) for value in values)


_KIND = "kind"  # the field that names an object's dataclass where there are several
_Owner = TypeVar("_Owner")


def to_json(config: ModelConfig) -> dict[str, Any]:
    """The fields of a JSON object that `from_json` reads."""
    fields = dataclasses.asdict(config)
    if config.rope_scaling is not None:
        fields["rope_scaling"] = {_KIND: type(config.rope_scaling).__name__, **fields["rope_scaling"]}
    return fields


def from_json(owner: type[_Owner], fields: Mapping[str, Any], source: str) -> _Owner:
    """A `ModelConfig`, or a part of one, from the fields of a JSON object. Null stands for a field's default.

    Raises:
      UserError: a field is unknown, missing or wrong.
    """
    hints = typing.get_type_hints(owner)
    refuse_unknown(fields, set(hints), source)
    # A dataclass keeps a default as an attribute of the class.
    given = [name for name in hints if fields.get(name) is not None or not hasattr(owner, name)]
    return owner(**{name: _taken(fields, name, source, hints[name]) for name in given})


def _taken(fields: Mapping[str, Any], name: str, source: str, hint: Any) -> Any:
    """The value of a field that is annotated with `hint`."""
    match typing.get_origin(hint), typing.get_args(hint):
        case types.UnionType, (kind, types.NoneType):
            return _taken(fields, name, source, kind)
        case types.UnionType, (*kinds, types.NoneType):
            return _one_of(fields, name, source, kinds)
        case builtins.tuple, (item, _):
            nullable = types.NoneType in typing.get_args(item)
            values = take_list(fields, name, source, "numbers")
            return tuple(None if v is None and nullable else _taken({name: v}, name, source, item) for v in values)
    take_count_or_layers = take_layers if name == "layers" else take_count
    reader = {int: take_count_or_layers, float: take_positive, bool: take_flag, str: take_name}[hint]
    return reader(fields, name, source)


def _one_of(fields: Mapping[str, Any], name: str, source: str, kinds: list[type]) -> Any:
    """The value of a field that holds an object of one of several dataclasses, which its `kind` names."""
    value, source = take_object(fields, name, source), f"{source}: field {name!r}"
    known = {kind.__name__: kind for kind in kinds}
    kind = take_name(value, _KIND, source)
    if kind not in known:
        raise UserError(f"{source}: kind {reprlib.repr(kind)} is not supported; supported: {', '.join(known)}")
    return from_json(known[kind], {key: held for key, held in value.items() if key != _KIND}, source)
