"""Where to filter which model: the default rule's settings, the paper's layer, and where each value comes from."""

import dataclasses
import importlib.resources
import json
import pathlib
import typing
from collections.abc import Mapping
from typing import Any, Literal

from gemfilter_jax.config import ModelConfig, refuse_unknown, take, take_positive
from gemfilter_jax.errors import UserError
from gemfilter_jax.methods.gemfilter.method import GemFilter

AUTO = "auto"
"""As a budget: as many tokens as hold a share of the score, up to the preset's `keep`."""

AUTO_SHARE = 0.3  # of the default model 14 of 15 questions were answered so, 12 and 13 with 1,024 and 512 tokens

_IDENTITY = ("layers", "width", "heads", "kv_heads", "vocab")  # fine-tunes of a model share its preset
_FIXED = ("keep_required", "positions")  # of a method, no matter of the model
_LEAST = {"filter_layer": 0, "first_tokens": 0}  # of whole numbers; others are at least 1


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model's filter settings.

    Attributes:
      name: of the model, "none" if there is no preset for it.
      default: the default rule.
      paper_layer: r of the paper's rule.
      source: where the values come from.
      recall: what `gemfilter calibrate` measured, a row for each layer, set of heads and budget.
    """

    name: str
    default: GemFilter
    paper_layer: int
    source: str
    recall: tuple[Mapping[str, Any], ...] = ()

    def layer(self, rule: str) -> int:
        """r of one of the rules "default" and "paper"."""
        return self.paper_layer if rule == "paper" else self.default.filter_layer

    def method(
        self, rule: str, keep: int | Literal["auto"] | None = None, filter_layer: int | None = None
    ) -> GemFilter:
        """The policy of one of the rules "default" and "paper", with the preset's values where none are given.

        Raises:
          UserError: a budget of "auto" under the paper's rule, whose scores are no shares of anything.
        """
        layer = self.layer(rule) if filter_layer is None else filter_layer
        budget = self.default.keep if keep is None or keep == AUTO else keep
        if rule == "paper":
            if keep == AUTO:
                raise UserError("the paper's rule keeps a number of tokens; give it in place of keep=auto")
            return GemFilter.paper(layer, budget)
        share = self.default.share if keep is None else None
        if keep == AUTO:
            share = self.default.share or AUTO_SHARE
        return dataclasses.replace(self.default, filter_layer=layer, keep=budget, share=share)


_PAPER_DEPTH = 13 / 32  # Llama 3.1 8B in the paper: layer 13 of 32
_PAPER = "arXiv 2409.17422, section 4"
_PAPER_LAYERS: dict[tuple[int, ...], tuple[str, int]] = {
    (32, 4096, 32, 8, 128256): ("Llama-3.1-8B", 13),
    (40, 5120, 32, 8, 131072): ("Mistral-Nemo-12B", 19),
    (32, 3072, 32, 32, 32064): ("Phi-3.5-mini", 19),
}
_FILES: dict[tuple[int, ...], str] = {(30, 576, 9, 3, 49152): "smollm2_135m.json"}


def _identity(config: ModelConfig) -> tuple[int, ...]:
    return tuple(getattr(config, name) for name in _IDENTITY)


def preset_for(config: ModelConfig) -> Preset:
    """The preset of a model, or the paper's depth with all heads for a model that has none."""
    identity = _identity(config)
    if identity in _FILES:
        path = importlib.resources.files("gemfilter_jax.methods.preset_files").joinpath(_FILES[identity])
        return _parsed(path.read_text("utf-8"), str(path), config)
    if identity in _PAPER_LAYERS:
        name, layer = _PAPER_LAYERS[identity]
        return Preset(name, GemFilter(filter_layer=layer), paper_layer=layer, source=_PAPER)
    layer = round(_PAPER_DEPTH * config.layers)
    source = f"no preset for this model: layer {layer} of {config.layers}, Llama 3.1's depth in the paper, all heads"
    return Preset("none", GemFilter(filter_layer=layer), paper_layer=layer, source=source)


def write_preset(preset: Preset, config: ModelConfig) -> str:
    """The preset of a model as the JSON that `read_preset` reads."""
    default = {name: value for name, value in dataclasses.asdict(preset.default).items() if name not in _FIXED}
    fields = {
        "name": preset.name,
        "model": {name: getattr(config, name) for name in _IDENTITY},
        "default": default,
        "paper_layer": preset.paper_layer,
        "source": preset.source,
    }
    rows = ",\n  ".join(json.dumps(row) for row in preset.recall)
    return f'{json.dumps(fields, indent=1)[:-2]},\n "recall": [\n  {rows}\n ]\n}}\n'


def read_preset(path: pathlib.Path, config: ModelConfig) -> Preset:
    """A preset from a JSON file that `gemfilter calibrate` wrote, or one like it.

    Raises:
      UserError: the file cannot be read, is damaged, or is another model's.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as a preset in JSON ({error})") from error
    return _parsed(text, str(path), config)


def _parsed(text: str, source: str, config: ModelConfig) -> Preset:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise UserError(f"{source}: not readable as a preset in JSON ({error})") from error
    _expect_object(fields, source)
    refuse_unknown(fields, {"name", "model", "default", "paper_layer", "source", "recall"}, source)
    model, default = take(fields, "model", source), take(fields, "default", source)
    for part, name in ((model, "model"), (default, "default")):
        _expect_object(part, f"{source}: field {name!r}")
    for name in _IDENTITY:
        found, wanted = take(model, name, f"{source}: field 'model'"), getattr(config, name)
        if found != wanted:
            raise UserError(f"{source}: is for a model with {name} {found}; this one has {wanted}")
    recall = take(fields, "recall", source, [])
    if not isinstance(recall, list) or not all(isinstance(row, dict) for row in recall):
        raise UserError(f"{source}: field 'recall' must be a list of objects")
    method = _method(default, config, f"{source}: field 'default'")
    return Preset(
        name=str(take(fields, "name", source)),
        default=method,
        paper_layer=_whole(fields, "paper_layer", 0, source, config.layers - 1),
        source=str(take(fields, "source", source)),
        recall=tuple(recall),
    )


def _expect_object(value: Any, source: str) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{source}: expected a JSON object, found {type(value).__name__}")


def _method(fields: dict[str, Any], config: ModelConfig, source: str) -> GemFilter:
    types = typing.get_type_hints(GemFilter)
    refuse_unknown(fields, set(types) - set(_FIXED), source)
    values: dict[str, Any] = {"filter_layer": _whole(fields, "filter_layer", 0, source, config.layers - 1)}
    for name, value in fields.items():
        kind = types[name]
        if name == "head_weights":
            values[name] = None if value is None else _weights(value, config.heads, source)
        elif name == "share":
            values[name] = None if value is None else _share(fields, source)
        elif name == "segment":
            values[name] = None if value is None else _whole(fields, name, 1, source)
        elif name == "rounds":
            if not isinstance(value, list):
                raise UserError(f"{source}: field 'rounds' is {value!r}, expected a list of whole numbers")
            values[name] = tuple(_whole({name: keep}, name, 1, source) for keep in value)
        elif kind is int and name != "filter_layer":
            values[name] = _whole(fields, name, _LEAST.get(name, 1), source)
        elif kind is bool:
            if not isinstance(value, bool):
                raise UserError(f"{source}: field {name!r} is {value!r}, expected true or false")
            values[name] = value
        elif typing.get_origin(kind) is Literal:
            if value not in typing.get_args(kind):
                raise UserError(f"{source}: field {name!r} is {value!r}, one of {', '.join(typing.get_args(kind))}")
            values[name] = value
    return GemFilter(**values)


def _share(fields: dict[str, Any], source: str) -> float:
    share = take_positive(fields, "share", source)
    if share > 1:
        raise UserError(f"{source}: field 'share' is {share!r}, expected at most 1")
    return share


def _whole(fields: dict[str, Any], name: str, least: int, source: str, most: int = 2**31 - 1) -> int:
    value = take(fields, name, source)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        if name.endswith("_layer"):
            raise UserError(f"{source}: field {name!r} is {value!r}; the model has layers 0 to {most}")
        raise UserError(f"{source}: field {name!r} is {value!r}, expected a whole number of at least {least}")
    return value


def _weights(values: Any, heads: int, source: str) -> tuple[float, ...]:
    fit = isinstance(values, list) and len(values) == heads
    fit = fit and all(isinstance(weight, int | float) and 0 <= weight < float("inf") for weight in values)
    if not fit or not any(values):
        raise UserError(
            f"{source}: field 'head_weights' must be a number of at least 0 for each of {heads} query heads, not all 0"
        )
    return tuple(map(float, values))
