"""Where to filter which model: filter layer, head weights and budget, and where each value comes from."""

import dataclasses

from gemfilter_jax.config import ModelConfig
from gemfilter_jax.methods import GemFilter


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model's filter settings.

    Attributes:
      name: of the model.
      filter_layer: r of the default rule. paper_layer: r of the paper's rule.
      keep: K.
      heads: 0-based query heads that score under the default rule; None for all.
      source: where the values come from.
    """

    name: str
    filter_layer: int
    paper_layer: int
    keep: int
    heads: tuple[int, ...] | None
    source: str

    def method(self, config: ModelConfig, rule: str) -> GemFilter:
        """The policy of one of the rules "default" and "paper"."""
        if rule == "paper":
            return GemFilter.paper(self.paper_layer, self.keep)
        weights = None
        if self.heads is not None:
            weights = tuple(float(head in self.heads) for head in range(config.heads))
        return GemFilter(filter_layer=self.filter_layer, keep=self.keep, head_weights=weights)


_PAPER_DEPTH = 13 / 32  # Llama 3.1 8B in the paper: layer 13 of 32

# Keyed by (layers, width, heads, kv_heads, vocab): fine-tunes of a model share its preset.
_PRESETS = {
    (30, 576, 9, 3, 49152): Preset(
        name="SmolLM2-135M",
        filter_layer=17,
        paper_layer=18,
        keep=1024,
        heads=(0, 3, 4),
        source="search over layers 11 to 17 and their heads on 24 hidden facts in 3,000 tokens of essays",
    ),
    (32, 4096, 32, 8, 128256): Preset(
        name="Llama-3.1-8B",
        filter_layer=13,
        paper_layer=13,
        keep=1024,
        heads=None,
        source="arXiv 2409.17422, section 4",
    ),
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
        heads=None,
        source=f"no preset for this model: layer {layer} of {config.layers}, Llama 3.1's depth in the paper, all heads",
    )
