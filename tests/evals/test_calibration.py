"""Calibration: heads that find facts are learned, recall is counted, the earliest layer that will do is chosen."""

import dataclasses
import pathlib

import numpy as np
import pytest

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals import calibration
from gemfilter_jax.evals.calibration import HeadSet, Plan, Recorded
from gemfilter_jax.evals.tasks.hidden_facts import HiddenFacts
from gemfilter_jax.methods import presets
from gemfilter_jax.reporting import plots
from gemfilter_jax.text.prompt import encode

_LAYERS, _HEADS = 3, 4


def _recorded(finders: dict[tuple[int, int], float], documents: int = 12, chunks: int = 40) -> list[Recorded]:
    """Noise in every head; the finders (layer, head) score their fact's chunk so many times the noise's mean."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(documents):
        scores = rng.exponential(size=(_LAYERS, _HEADS, chunks)).astype(np.float32)
        holds = np.zeros((1, chunks), bool)
        holds[0, rng.integers(chunks)] = True
        for place, strength in finders.items():
            scores[place][holds[0]] = strength
        made.append(Recorded(scores, np.full(chunks, 10), holds, required=20))
    return made


def test_the_head_that_finds_is_learned():
    heads = calibration.learn(_recorded({(1, 2): 30.0}), [1])
    assert heads.of_layer(1, _HEADS)[2] == 1.0
    assert sum(heads.of_layer(1, _HEADS)) < 1.5
    assert heads.of_layer(0, _HEADS) == (0.0,) * _HEADS


def test_heads_of_several_layers_are_learned_together():
    """Each head finds the facts of its own half of the documents; only both together find all."""
    half = _recorded({(0, 3): 30.0}), _recorded({(2, 1): 30.0})
    heads = calibration.learn(half[0][:6] + half[1][6:], range(3))
    strong = {place for place, weight in zip(zip(heads.layers, heads.heads), heads.weights) if weight > 0.3}  # noqa: B905
    assert strong == {(0, 3), (2, 1)}


def test_learning_is_deterministic():
    recorded = _recorded({(1, 2): 5.0})
    assert calibration.learn(recorded, range(3)) == calibration.learn(recorded, range(3))


def test_recall_counts_whole_chunks_within_the_budget():
    scores = np.zeros((1, 2, 4), np.float32)
    scores[0, 1] = [4, 3, 2, 1]
    holds = np.array([[True, True, False, False], [False, False, True, False]])
    one = Recorded(scores, sizes=np.array([5, 6, 7, 8]), facts=holds, required=10)
    heads = HeadSet((0,), (1,), (1.0,))
    for keep, kept in ((20, 0), (21, 1), (27, 1), (28, 2)):  # 10 required, then chunks of 5, 6 and 7
        measured = calibration.recall([one], heads, keep)
        assert (measured.facts, measured.kept) == (2, kept)
    assert calibration.recall([one], calibration.all_heads(0, 2), 21).kept == 1


def test_the_chunks_without_which_a_fact_is_lost():
    """A fact of 100 characters; chunks that hold 4, 89 and 7 of them."""
    starts, ends = np.array([0, 54, 143]), np.array([54, 143, 300])
    assert calibration._holders(starts, ends, (50, 150)).tolist() == [False, True, False]


_PLAN = Plan(
    keep=128,
    target=0.5,
    layers=4,
    tokens=640,
    train=3,
    held_out=2,
    distractors=1,
    seed=0,
    filter_attention="auto",
    filter_precision="float",
)


def test_calibration_is_deterministic_and_its_preset_can_be_used(smollm2, tmp_path: pathlib.Path):
    told: list[tuple[str, int, int]] = []
    runs = [calibration.calibrate(smollm2, _PLAN, progress=lambda *stage: told.append(stage)) for _ in range(2)]
    assert runs[0] == runs[1]
    judged, preset = runs[0]
    assert [one.layer for one in judged] == [0, 1, 2, 3]
    assert [one.keep for one in judged[0].learned] == [64, 128]
    assert judged[0].learned[0].facts == 2
    best = [one.learned[-1].share for one in judged]
    enough = [layer for layer, share in enumerate(best) if share >= _PLAN.target]
    assert preset.default.filter_layer == (enough[0] if enough else int(np.argmax(best)))
    assert told[:3] == [("reading, train", 1, 3), ("reading, train", 2, 3), ("reading, train", 3, 3)]
    path = tmp_path / "preset.json"
    path.write_text(presets.write_preset(preset, smollm2.checkpoint.model.config))
    read = presets.read_preset(path, smollm2.checkpoint.model.config)
    assert read == preset
    example = next(HiddenFacts(count=1).examples(smollm2.checkpoint.tokenizer, 640))
    kept, _ = dataclasses.replace(smollm2, preset=read).select(example.text, example.question)
    assert kept.kept_tokens == 128
    plots.recall(judged, _PLAN.target, str(tmp_path / "recall.png"))
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_recorded_scores_are_the_filters_own(smollm2):
    """Of one head: the chunks that it puts first are those that the filter keeps when that head alone counts."""
    example = next(HiddenFacts(count=1).examples(smollm2.checkpoint.tokenizer, 600))
    sixth = (0.0,) * 5 + (1.0,) + (0.0,) * 3
    method = dataclasses.replace(smollm2.method(keep=128), filter_layer=2, head_weights=sixth)
    one = calibration.record(smollm2, example, method, layers=3)
    order = np.argsort(-one.scores[2, 5], kind="stable")
    fits = one.required + np.cumsum(one.sizes[order]) <= 128
    kept, _ = smollm2.select(example.text, example.question, method=method)
    prompt = encode(smollm2.checkpoint.tokenizer, example.text, example.question, observation_rows=32)
    begins = prompt.prefix_length + np.cumsum(np.append(0, one.sizes))
    assert begins[-1] == len(prompt) - prompt.suffix_length
    assert fits.sum() > 1
    for chunk in order[fits]:
        assert set(range(begins[chunk], begins[chunk + 1])) <= set(kept.indices)
    assert not set(range(begins[order[-1]], begins[order[-1] + 1])) & set(kept.indices)


def test_texts_longer_than_one_pass_are_refused(smollm2):
    with pytest.raises(UserError, match="tokens is 5000; the model reads 8192"):
        calibration.calibrate(smollm2, dataclasses.replace(_PLAN, tokens=5000), progress=lambda *_: None)
