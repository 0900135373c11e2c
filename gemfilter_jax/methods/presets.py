"""Filter settings for each model: the default rule's settings, the paper's layer, and the source of the values."""

import dataclasses
import importlib.resources
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from gemfilter_jax import files
from gemfilter_jax.config import ModelConfig, refuse_unknown, take
from gemfilter_jax.errors import UserError
from gemfilter_jax.methods.gemfilter.method import AUTO, AUTO_RECALL, SHARE_OF_ATTENTION, GemFilter, Head

_IDENTITY = ("layers", "width", "heads", "kv_heads", "vocab")  # fine-tunes of a model share its preset


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model's filter settings.

    Attributes:
      name: name of the model, or "none" if there is no preset for the model.
      default: settings of the default rule.
      paper_layer: filter layer r of the paper's rule.
      source: where the values come from.
      recall: measurements of `gemfilter calibrate`, one row for each layer, head set and budget.
    """

    name: str
    default: GemFilter
    paper_layer: int
    source: str
    recall: tuple[Mapping[str, Any], ...] = ()

    def layer(self, rule: str) -> int:
        """The filter layer r of a rule; see `method`."""
        return self.default.filter_layer if rule == "default" else self.paper_layer

    def method(
        self, rule: str, keep: int | Literal["auto"] | None = None, filter_layer: int | None = None
    ) -> GemFilter:
        """The method of a rule; the preset supplies values that are not given.

        Args:
          rule: "default", "paper", or "uncalibrated": the default rule at the paper's layer, with equal head weights.
          filter_layer: heads of the preset that are beyond it do not count; if none is left, all of its own do.

        Raises:
          UserError: the budget is "auto" under the paper's rule, whose scores are not probabilities.
        """
        layer = self.layer(rule) if filter_layer is None else filter_layer
        budget = self.default.keep if keep is None or keep == AUTO else keep
        if rule == "paper":
            if keep == AUTO:
                raise UserError("the paper's rule keeps a number of tokens; give it in place of keep=auto")
            return GemFilter.paper(layer, budget)
        own = self.default
        share, recall = (own.share, own.recall) if keep is None else (None, None)
        if keep == AUTO and own.ranks_passages:
            recall = own.recall or AUTO_RECALL
        elif keep == AUTO:
            share = own.share or SHARE_OF_ATTENTION
        known = [] if rule == "uncalibrated" else [one for one in own.chosen_heads if one.layer <= layer]
        heads = tuple(map(str, known)) or None
        method = dataclasses.replace(own, filter_layer=layer, keep=budget, share=share, recall=recall, heads=heads)
        if heads != own.heads:
            method = dataclasses.replace(method, sharpness=GemFilter.sharpness, recall_fit=None)
        return dataclasses.replace(method, head_weights=None) if rule == "uncalibrated" else method


_PAPER_DEPTH = 13 / 32  # Llama 3.1 8B in the paper: layer 13 of 32
_DEPTH = 9 / 16  # of models without a preset: by then most of the published heads of other models have looked
_PUBLISHED = 3 / 4  # of a model's published heads, which the filter layer must reach
_PAPER = "arXiv 2409.17422, section 4"
_PAPER_LAYERS: dict[tuple[int, ...], tuple[str, int]] = {
    (32, 4096, 32, 8, 128256): ("Llama-3.1-8B", 13),
    (40, 5120, 32, 8, 131072): ("Mistral-Nemo-12B", 19),
    (32, 3072, 32, 32, 32064): ("Phi-3.5-mini", 19),
}
_FILES: dict[tuple[int, ...], str] = {(30, 576, 9, 3, 49152): "smollm2_135m.json"}
_HEADS = "published_heads.json"


def _identity(config: ModelConfig) -> tuple[int, ...]:
    return tuple(getattr(config, name) for name in _IDENTITY)


def preset_for(config: ModelConfig) -> Preset:
    """The preset of a model; a model without one gets a filter layer at a common relative depth, with all heads."""
    identity = _identity(config)
    folder = importlib.resources.files("gemfilter_jax.methods.preset_files")
    if identity in _FILES:
        path = folder.joinpath(_FILES[identity])
        return _parsed(path.read_text("utf-8"), str(path), config)
    name, paper_layer = _PAPER_LAYERS.get(identity, ("none", round(_PAPER_DEPTH * config.layers)))
    published = json.loads(folder.joinpath(_HEADS).read_text("utf-8"))
    for one in published["models"]:
        if tuple(one["model"][name] for name in _IDENTITY) == identity:
            return _of_published_heads(one, published["source"], paper_layer)
    if identity in _PAPER_LAYERS:
        return Preset(name, GemFilter(filter_layer=paper_layer), paper_layer, source=_PAPER)
    layer = round(_DEPTH * config.layers)
    source = f"no preset for this model: layer {layer} of {config.layers}, all heads; gemfilter calibrate makes one"
    return Preset(name, GemFilter(filter_layer=layer), paper_layer, source=source)


def _of_published_heads(model: Mapping[str, Any], source: str, paper_layer: int) -> Preset:
    """A preset of heads that others have found, up to the layer that reaches three quarters of them."""
    layers = sorted(head.layer for one in model["heads"] if (head := Head.parse(one)))
    last = layers[math.ceil(_PUBLISHED * len(layers)) - 1]
    heads = tuple(one for one in model["heads"] if (head := Head.parse(one)) and head.layer <= last)
    default = GemFilter(filter_layer=last, normalisation="sink", heads=heads)
    told = f"heads published by {source}, up to layer {last}; not measured here"
    return Preset(model["name"], default, paper_layer, source=told)


def write_preset(preset: Preset, config: ModelConfig) -> str:
    """The preset of a model as JSON for `read_preset`."""
    fields = {
        "name": preset.name,
        "model": {name: getattr(config, name) for name in _IDENTITY},
        "default": preset.default.fields,
        "paper_layer": preset.paper_layer,
        "source": preset.source,
    }
    rows = ",\n  ".join(json.dumps(row) for row in preset.recall)
    return f'{json.dumps(fields, indent=1)[:-2]},\n "recall": [\n  {rows}\n ]\n}}\n'


def read_preset(path: pathlib.Path, config: ModelConfig) -> Preset:
    """A preset from a JSON file in the format of `gemfilter calibrate`.

    Raises:
      UserError: the file cannot be read, is damaged, or is for another model.
    """
    return _parsed(files.read_text(path, str(path), plain=True), str(path), config)


def _parsed(text: str, source: str, config: ModelConfig) -> Preset:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
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
    layer = take(fields, "paper_layer", source)
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < config.layers:
        raise UserError(f"{source}: field 'paper_layer' is {layer!r}; the model has layers 0 to {config.layers - 1}")
    return Preset(
        name=str(take(fields, "name", source)),
        default=GemFilter.from_fields(default, config, f"{source}: field 'default'"),
        paper_layer=layer,
        source=str(take(fields, "source", source)),
        recall=tuple(recall),
    )


def _expect_object(value: Any, source: str) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{source}: expected a JSON object, found {type(value).__name__}")
