"""Where to filter which model: filter layer, head weights and budget, and where each value comes from."""

import dataclasses
import json
import pathlib

from gemfilter_jax.config import ModelConfig, refuse_unknown, take, take_count
from gemfilter_jax.errors import UserError
from gemfilter_jax.methods import GemFilter


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model's filter settings.

    Attributes:
      name: of the model, "none" if there is no preset for it.
      filter_layer: r of the default rule. paper_layer: r of the paper's rule.
      keep: K.
      head_weights: of each query head under the default rule; None for all alike.
      source: where the values come from.
    """

    name: str
    filter_layer: int
    paper_layer: int
    keep: int
    head_weights: tuple[float, ...] | None
    source: str

    def layer(self, rule: str) -> int:
        """r of one of the rules "default" and "paper"."""
        return self.paper_layer if rule == "paper" else self.filter_layer

    def method(self, rule: str) -> GemFilter:
        """The policy of one of the rules "default" and "paper"."""
        if rule == "paper":
            return GemFilter.paper(self.paper_layer, self.keep)
        return GemFilter(filter_layer=self.filter_layer, keep=self.keep, head_weights=self.head_weights)


_PAPER_DEPTH = 13 / 32  # Llama 3.1 8B in the paper: layer 13 of 32
_PAPER = "arXiv 2409.17422, section 4"


def _of_paper(name: str, layer: int) -> Preset:
    return Preset(name, filter_layer=layer, paper_layer=layer, keep=1024, head_weights=None, source=_PAPER)


# Keyed by (layers, width, heads, kv_heads, vocab): fine-tunes of a model share its preset.
_PRESETS = {
    (30, 576, 9, 3, 49152): Preset(
        name="SmolLM2-135M",
        filter_layer=17,
        paper_layer=18,
        keep=1024,
        head_weights=(1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0),
        source="search over layers 11 to 17 and their heads on 24 hidden facts in 3,000 tokens of essays",
    ),
    (32, 4096, 32, 8, 128256): _of_paper("Llama-3.1-8B", 13),
    (40, 5120, 32, 8, 131072): _of_paper("Mistral-Nemo-12B", 19),
    (32, 3072, 32, 32, 32064): _of_paper("Phi-3.5-mini", 19),
}


def preset_for(config: ModelConfig) -> Preset:
    """The preset of a model, or the paper's depth with all heads for a model that has none."""
    known = _PRESETS.get((config.layers, config.width, config.heads, config.kv_heads, config.vocab))
    if known:
        return known
    layer = round(_PAPER_DEPTH * config.layers)
    return Preset(
        name="none",
        filter_layer=layer,
        paper_layer=layer,
        keep=1024,
        head_weights=None,
        source=f"no preset for this model: layer {layer} of {config.layers}, Llama 3.1's depth in the paper, all heads",
    )


def read_preset(path: pathlib.Path, config: ModelConfig) -> Preset:
    """A preset from a JSON file with the fields of `Preset`.

    Raises:
      UserError: the file cannot be read, or does not fit the model.
    """
    source = str(path)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: not readable as a preset in JSON ({error})") from error
    if not isinstance(fields, dict):
        raise UserError(f"{source}: expected a JSON object, found {type(fields).__name__}")
    refuse_unknown(fields, {field.name for field in dataclasses.fields(Preset)}, source)
    weights = fields.get("head_weights")
    if weights is not None:
        fit = isinstance(weights, list) and len(weights) == config.heads
        if not fit or not all(isinstance(weight, int | float) and weight >= 0 for weight in weights):
            raise UserError(
                f"{source}: field 'head_weights' must be a number of at least 0 for each of {config.heads} query heads"
            )
    return Preset(
        name=str(take(fields, "name", source)),
        filter_layer=_layer(fields, "filter_layer", config, source),
        paper_layer=_layer(fields, "paper_layer", config, source),
        keep=take_count(fields, "keep", source),
        head_weights=None if weights is None else tuple(map(float, weights)),
        source=str(take(fields, "source", source)),
    )


def _layer(fields: dict, name: str, config: ModelConfig, source: str) -> int:
    layer = take(fields, name, source)
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < config.layers:
        raise UserError(f"{source}: field {name!r} is {layer!r}; the model has layers 0 to {config.layers - 1}")
    return layer
