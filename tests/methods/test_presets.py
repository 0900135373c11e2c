"""Presets: what the paper publishes, the rule for other models, what comes with the package, files of one's own."""

import dataclasses
import json
import pathlib

import pytest
import tiny

from gemfilter_jax.config import ModelConfig
from gemfilter_jax.errors import UserError
from gemfilter_jax.methods import presets
from gemfilter_jax.methods.gemfilter.method import AUTO_RECALL, SHARE_OF_ATTENTION, GemFilter
from gemfilter_jax.methods.presets import Preset, preset_for, read_preset, write_preset

_MODEL = {"layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "vocab": 128}
_DEFAULT = {"filter_layer": 2, "keep": 96, "head_weights": [0, 1, 0.5, 0]}
FIELDS = {"name": "tiny", "model": _MODEL, "default": _DEFAULT, "paper_layer": 3, "source": "here"}
_OWN = GemFilter(filter_layer=2, keep=96, head_weights=(0.0, 1.0, 0.5, 0.0), lexical=0.0, carry=0.0)  # as they were


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
    assert preset.method("uncalibrated").filter_layer == layer
    if name != "Llama-3.1-8B":
        assert preset.method("default") == GemFilter(filter_layer=layer, keep=1024)


@pytest.mark.parametrize(
    ("shape", "name", "layer", "heads"),
    [
        ((32, 4096, 32, 8, 128256), "Llama-3.1-8B", 16, 13),
        ((80, 8192, 64, 8, 128256), "Llama-3.1-70B", 37, 24),
        ((16, 2048, 32, 8, 128256), "Llama-3.2-1B", 8, 13),
        ((28, 3072, 24, 8, 128256), "Llama-3.2-3B", 15, 13),
        ((28, 3584, 28, 4, 152064), "Qwen2.5-7B", 19, 15),
    ],
)
def test_published_heads_count_up_to_the_layer_that_reaches_three_quarters(shape, name, layer, heads):
    preset = preset_for(config(*shape))
    method = preset.method("default")
    assert (preset.name, method.filter_layer, len(method.chosen_heads)) == (name, layer, heads)
    assert max(head.layer for head in method.chosen_heads) == layer
    assert "arXiv 2506.09944" in preset.source
    assert "not measured here" in preset.source
    assert method._fault(config(*shape)) is None


def test_heads_beyond_another_filter_layer_do_not_count():
    preset = preset_for(config(28, 3584, 28, 4, 152064))
    earlier = preset.method("default", filter_layer=16)
    assert {head.layer for head in earlier.chosen_heads} == {15, 16}
    assert preset.method("default", filter_layer=9).heads is None
    assert preset.method("uncalibrated").heads is None


def test_other_models_are_filtered_where_published_heads_have_looked():
    preset = preset_for(config(24, 896, 14, 2, 151936))
    assert preset.name == "none"
    assert preset.layer("default") == 14  # 24 * 9 / 16 = 13.5
    assert preset.layer("paper") == 10  # 24 * 13 / 32 = 9.75
    assert "layer 14 of 24" in preset.source


def test_the_default_model_has_been_calibrated():
    preset = preset_for(config(30, 576, 9, 3, 49152))

    def share(kept: dict[str, list[int]]) -> float:
        shares = [held / asked for held, asked in kept.values()]
        return (sum(shares) + min(shares)) / (len(shares) + 1)

    shares = {
        row["layer"]: share(row["kept"])
        for row in preset.recall
        if row["kind"] == "learned" and row["keep"] == preset.default.keep
    }
    own = shares[preset.default.filter_layer]
    assert own >= 0.97 * max(shares.values())
    assert all(
        share < 0.97 * max(shares.values()) for layer, share in shares.items() if layer < preset.layer("default")
    )
    (row,) = (
        row
        for row in preset.recall
        if (row["layer"], row["kind"], row["keep"]) == (preset.layer("default"), "learned", preset.default.keep)
    )
    assert preset.default.heads == tuple(row["heads"])
    assert preset.default.recall_of(0.99, 200) > 0.8


def test_a_file(tmp_path):
    path = tmp_path / "preset.json"
    path.write_text(json.dumps(FIELDS))
    preset = read_preset(path, tiny.CONFIG)
    assert preset.method("default") == _OWN
    assert preset.method("default", 50, 1) == dataclasses.replace(_OWN, keep=50, filter_layer=1)
    assert preset.method("default", presets.AUTO) == dataclasses.replace(_OWN, share=0.3)
    ranked = dataclasses.replace(preset, default=dataclasses.replace(_OWN, lexical=0.7))
    assert ranked.method("default", presets.AUTO).recall == AUTO_RECALL
    assert ranked.method("default", presets.AUTO).share is None
    adaptive = dataclasses.replace(preset, default=dataclasses.replace(_OWN, share=0.4))
    assert adaptive.method("default").share == adaptive.method("default", presets.AUTO).share == 0.4
    assert adaptive.method("default", 50) == dataclasses.replace(_OWN, keep=50)
    assert preset.method("paper") == GemFilter.paper(filter_layer=3, keep=96)
    with pytest.raises(UserError, match="keep=auto"):
        preset.method("paper", presets.AUTO)


def test_a_share_that_was_written_for_ranked_passages_is_a_recall(tmp_path):
    path = tmp_path / "preset.json"
    path.write_text(json.dumps(FIELDS | {"default": FIELDS["default"] | {"lexical": 0.7, "share": 0.9}}))
    default = read_preset(path, tiny.CONFIG).default
    assert (default.share, default.recall) == (None, 0.9)


@pytest.mark.parametrize(
    ("of_preset", "given", "share", "recall"),
    [
        ({"share": 0.4}, {"lexical": 0.7}, None, AUTO_RECALL),
        ({}, {"lexical": 0.7, "keep": presets.AUTO}, None, AUTO_RECALL),
        ({"lexical": 0.7, "recall": 0.8}, {"lexical": 0.0}, SHARE_OF_ATTENTION, None),
        ({"lexical": 0.7, "recall": 0.8}, {"lexical": 0.0, "share": 0.5}, 0.5, None),
        ({"lexical": 0.7, "recall": 0.8}, {"recall": 0.6}, None, 0.6),
    ],
)
def test_what_decides_how_much_is_kept_fits_how_passages_are_ranked(of_preset, given, share, recall):
    preset = Preset("tiny", dataclasses.replace(_OWN, **of_preset), 3, source="test")
    method = GemFilter.of("default", preset, **given)
    method.check(tiny.decoder())
    assert (method.share, method.recall) == (share, recall)


@pytest.mark.parametrize("name", ["lexical", "carry"])
def test_the_papers_rule_knows_attention_alone(name):
    preset = Preset("tiny", _OWN, 3, source="test")
    assert getattr(GemFilter.of("paper", preset, **{name: 0.0}), name) == 0
    with pytest.raises(UserError, match=f"{name} is 0.5; under the paper's rule only attention counts"):
        GemFilter.of("paper", preset, **{name: 0.5})


def test_an_estimate_is_of_what_it_was_fitted_to():
    fit = (0.0, 1.0, 0.0)
    preset = Preset("tiny", dataclasses.replace(_OWN, lexical=0.7, recall_fit=fit), 3, source="test")
    assert GemFilter.of("default", preset, lexical=0.7, keep=50).recall_fit == fit
    for given in ({"lexical": 0.3}, {"carry": 0.5}, {"chunk": 32}, {"heads": ("0/1",), "head_weights": None}):
        assert GemFilter.of("default", preset, **given).recall_fit is None


def test_what_is_written_is_read_back(tmp_path):
    method = dataclasses.replace(
        _OWN,
        share=0.5,
        pooling="mean",
        sentences=False,
        filter_attention="dense",
        rounds=(9, 8),
        segment=640,
        filter_precision="int8",
    )
    written = Preset("tiny", method, paper_layer=1, source="here", recall=({"layer": 1}, {"layer": 2}))
    path = tmp_path / "preset.json"
    path.write_text(write_preset(written, tiny.CONFIG))
    assert read_preset(path, tiny.CONFIG) == written


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": _MODEL | {"layers": 5}}, "is for a model with layers 5; this one has 4"),
        ({"model": _MODEL | {"vocab": None}}, "'vocab' is missing"),
        ({"model": [4]}, "'model': expected a JSON object"),
        ({"paper_layer": None}, "'paper_layer' is missing"),
        ({"paper_layer": 4}, "'paper_layer' is 4; the model has layers 0 to 3"),
        ({"share": 0.5}, "unsupported field.* share"),
        ({"recall": 3}, "'recall' must be a list"),
        ({"heads": [1]}, "unsupported field.* heads"),
    ],
    ids=str,
)
def test_a_file_that_does_not_fit(tmp_path, change, words):
    _check_refused(tmp_path, FIELDS | change, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"filter_layer": 4}, "'filter_layer' is 4; the model has layers 0 to 3"),
        ({"head_weights": [1, 1]}, "each of 4 query heads"),
        ({"head_weights": [1, 1, -1, 1]}, "at least 0"),
        ({"head_weights": [0, 0, 0, 0]}, "not all 0"),
        ({"heads": ["1/2"]}, "head_weights and heads were given"),
        ({"head_weights": None, "heads": ["3/0"]}, "head '3/0' .* layers up to the filter layer, 2, and heads 0 to 3"),
        ({"head_weights": None, "heads": ["1/4"]}, "head '1/4' .* heads 0 to 3"),
        ({"head_weights": None, "heads": ["1.2"]}, "head '1.2' .* expected layer/head"),
        ({"head_weights": None, "heads": ["1/2", "1/2:0.5"]}, "heads is empty or names one twice"),
        ({"head_weights": None, "heads": []}, "heads is empty"),
        ({"head_weights": None, "heads": [12]}, "heads.* expected a list of strings"),
        ({"lexical": -1}, "'lexical' is -1, expected a number of at least 0"),
        ({"chunk": 1, "lexical": 0.7}, "shared words, need chunks"),
        ({"normalisation": "none", "lexical": 0.7}, "a normalisation other than 'none'"),
        ({"head_weights": [1, float("nan"), 0, 0]}, "'head_weights' is .* expected a list of numbers of at least 0"),
        ({"keep": 0}, "'keep' is 0"),
        ({"keep": True}, "'keep' is True"),
        ({"share": "much"}, "'share' is 'much'"),
        ({"share": 1.5}, "'share' is 1.5, expected a number above 0 and at most 1"),
        ({"sentences": 1}, "'sentences' is 1"),
        ({"pooling": "median"}, "'pooling' is 'median', one of none, mean, max"),
        ({"filter_precision": "half"}, "'filter_precision' is 'half', one of float, int8"),
        ({"segment": 0}, "'segment' is 0"),
        ({"rounds": 5}, "'rounds' is 5"),
        ({"rounds": [5.5]}, r"'rounds' is \[5.5\], expected a list of whole numbers"),
        ({"positions": "original"}, "unsupported field.* positions"),
    ],
    ids=str,
)
def test_a_rule_that_does_not_fit(tmp_path, change, words):
    _check_refused(tmp_path, FIELDS | {"default": _DEFAULT | change}, words)


def _check_refused(folder: pathlib.Path, fields: dict, words: str) -> None:
    path = folder / "preset.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=words) as error:
        read_preset(path, tiny.CONFIG)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", [None, "{", "[1]", json.dumps(FIELDS)[:-40], "[" * 200_000], ids=lambda text: str(text)[:9]
)
def test_no_preset_at_all(tmp_path, text):
    path = tmp_path / "preset.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"preset\.json"):
        read_preset(path, tiny.CONFIG)
