"""Presets: what the paper publishes, the stated rule for other models, and files of one's own."""

import dataclasses
import json

import pytest
import tiny

from gemfilter_jax.config import ModelConfig
from gemfilter_jax.errors import UserError
from gemfilter_jax.methods import GemFilter
from gemfilter_jax.presets import preset_for, read_preset

FIELDS = {
    "name": "tiny", "filter_layer": 2, "paper_layer": 3, "keep": 96, "head_weights": [0, 1, 0.5, 0], "source": "here",
}  # fmt: skip


def config(layers: int, width: int, heads: int, kv_heads: int, vocab: int) -> ModelConfig:
    shape = {"layers": layers, "width": width, "heads": heads, "kv_heads": kv_heads, "vocab": vocab}
    return dataclasses.replace(tiny.CONFIG, **shape)


@pytest.mark.parametrize(
    ("shape", "name", "layer"),
    [
        ((32, 4096, 32, 8, 128256), "Llama-3.1-8B", 13),
        ((40, 5120, 32, 8, 131072), "Mistral-Nemo-12B", 19),
        ((32, 3072, 32, 32, 32064), "Phi-3.5-mini", 19),
    ],
)
def test_the_papers_models_have_its_layers(shape, name, layer):
    preset = preset_for(config(*shape))
    assert preset.name == name
    assert preset.method("paper") == GemFilter.paper(filter_layer=layer, keep=1024)
    assert preset.method("default") == GemFilter(filter_layer=layer, keep=1024)


def test_other_models_are_filtered_at_the_same_depth():
    preset = preset_for(config(24, 896, 14, 2, 151936))
    assert preset.name == "none"
    assert preset.layer("default") == preset.layer("paper") == 10  # 24 * 13 / 32 = 9.75
    assert "layer 10 of 24" in preset.source


def test_a_file(tmp_path):
    path = tmp_path / "preset.json"
    path.write_text(json.dumps(FIELDS))
    preset = read_preset(path, tiny.CONFIG)
    assert preset.method("default") == GemFilter(filter_layer=2, keep=96, head_weights=(0.0, 1.0, 0.5, 0.0))
    assert preset.method("paper") == GemFilter.paper(filter_layer=3, keep=96)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"filter_layer": 4}, "'filter_layer' is 4; the model has layers 0 to 3"),
        ({"paper_layer": None}, "'paper_layer' is missing"),
        ({"head_weights": [1, 1]}, "each of 4 query heads"),
        ({"head_weights": [1, 1, -1, 1]}, "at least 0"),
        ({"keep": 0}, "'keep' is 0"),
        ({"heads": [1]}, "unsupported field.* heads"),
    ],
    ids=str,
)
def test_a_file_that_does_not_fit(tmp_path, change, words):
    path = tmp_path / "preset.json"
    path.write_text(json.dumps(FIELDS | change))
    with pytest.raises(UserError, match=words) as error:
        read_preset(path, tiny.CONFIG)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", [None, "{", "[1]"])
def test_no_preset_at_all(tmp_path, text):
    path = tmp_path / "preset.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"preset\.json"):
        read_preset(path, tiny.CONFIG)
