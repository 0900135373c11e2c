"""Calibration: heads that find facts are learned, recall is counted, the earliest layer that will do is chosen."""

import collections
import dataclasses
import json
import pathlib

import numpy as np
import pytest

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals.calibration import calibrate, learning, recording
from gemfilter_jax.evals.calibration.calibrate import Plan
from gemfilter_jax.evals.calibration.learning import Ranking
from gemfilter_jax.evals.calibration.recording import Recorded
from gemfilter_jax.evals.tasks.hidden_facts import HiddenFacts
from gemfilter_jax.evals.tasks.real_questions import RealQuestions
from gemfilter_jax.methods import presets
from gemfilter_jax.methods.gemfilter.method import GemFilter, Head
from gemfilter_jax.reporting import plots
from gemfilter_jax.text.prompt import encode

_LAYERS, _HEADS = 3, 4


def _recorded(
    finders: dict[tuple[int, int], float], documents: int = 12, count: int = 40, kind: str = "facts", words: float = 0.0
) -> list[Recorded]:
    """Noise in every head; the finders (layer, head) score their fact's passage so many times the noise's mean."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(documents):
        scores = rng.exponential(size=(_LAYERS, _HEADS, count)).astype(np.float32)
        holds = np.zeros((1, count), bool)
        holds[0, rng.integers(count)] = True
        for place, strength in finders.items():
            scores[place][holds[0]] = strength
        shared = np.where(holds[0], np.float32(words), np.float32(0))
        sizes = np.full(count, 10)
        texts = [str(index) for index in range(count)]
        made.append(Recorded(kind, scores, texts, shared, sizes, holds, either=False, required=20))
    return made


def _places(heads: tuple[Head, ...], at_least: float = 0.0) -> set[tuple[int, int]]:
    return {(one.layer, one.head) for one in heads if one.weight > at_least}


def test_the_head_that_finds_is_learned():
    heads = learning.learn(_recorded({(1, 2): 300.0}), 3, 0.7, 0.2)
    assert _places(heads, 0.5) == {(1, 2)}
    assert max(one.weight for one in heads) == 1.0
    heads = learning.learn(_recorded({(1, 2): 300.0}), 1, 0.7, 0.2)
    assert _places(heads) <= {(0, head) for head in range(_HEADS)}


def test_heads_of_several_layers_are_learned_together():
    """Each head finds the facts of its own half of the documents; only both together find all."""
    half = _recorded({(0, 3): 300.0}, 40), _recorded({(2, 1): 300.0}, 40)
    heads = learning.learn(half[0][:20] + half[1][20:], 3, 0.7, 0.2)
    assert _places(heads, 0.3) == {(0, 3), (2, 1)}


def test_every_kind_of_question_has_the_same_weight():
    """Three questions of one kind count as much as thirty of another: both kinds' heads are learned."""
    few, many = _recorded({(0, 3): 300.0}, 3, kind="few"), _recorded({(2, 1): 300.0}, 30, kind="many")
    heads = learning.learn([*few, *many], 3, 0.7, 0.2)
    assert _places(heads, 0.3) == {(0, 3), (2, 1)}


@pytest.mark.parametrize("sharpness", [0.5, 2.0])
def test_the_sharpness_is_the_one_that_ranks_were_drawn_with(sharpness):
    """Of 2,000 documents whose answers were drawn from softmax(sharpness * rank)."""
    rng, made = np.random.default_rng(0), []
    ranking = Ranking(1, (Head(1, 2),), 0.0, 0.0)
    for one in _recorded({}, 2000, 10):
        likely = np.exp(sharpness * ranking.ranks(one))
        answer = np.arange(10) == rng.choice(10, p=likely / likely.sum())
        made.append(dataclasses.replace(one, answers=answer[None]))
    # The standard error of the estimate is 1 / sqrt(2000 * variance of the ranks under the softmax), below 0.05 of it.
    assert learning.sharpest(made, ranking) == pytest.approx(sharpness, rel=0.25)


@pytest.mark.parametrize("overstated", [1.0, 3.0])
def test_estimates_of_recall_are_as_high_as_recall(overstated):
    """Also where passages with answers are told with too much sharpness, which makes shares too high or too low."""
    rng, made = np.random.default_rng(1), []
    ranking = Ranking(1, (Head(1, 2),), 0.0, 0.0)
    for one in _recorded({}, 1500, 30):
        likely = np.exp(ranking.ranks(one))
        answer = np.arange(30) == rng.choice(30, p=likely / likely.sum())
        made.append(dataclasses.replace(one, answers=answer[None]))
    fit = learning.recall_fit(made, ranking, overstated, 100)
    method = GemFilter(filter_layer=1, heads=("1/2",), recall_fit=fit)
    for keep in (50, 100, 200):
        stated, kept = [], []
        for one in made:
            ranks = ranking.ranks(one)
            evidence = np.exp(overstated * ranks)
            held = one.kept(ranks, keep)
            stated.append(method.recall_of(float(evidence[held].sum() / evidence.sum()), 30))
            kept.append(bool(held[one.answers[0]].all()))
        # Three standard errors of the share kept, 0.04, and the misfit of a straight line.
        assert np.mean(stated) == pytest.approx(np.mean(kept), abs=0.06)


def test_learning_is_deterministic():
    recorded = _recorded({(1, 2): 5.0})
    assert learning.learn(recorded, 3, 0.7, 0.2) == learning.learn(recorded, 3, 0.7, 0.2)


def test_recall_counts_whole_passages_within_the_budget():
    scores = np.ones((1, 2, 4), np.float32)
    scores[0, 1] = [4, 3, 2, 1]
    answers = np.array([[True, True, False, False], [False, False, True, False]])
    sizes = np.array([5, 6, 7, 8])
    one = Recorded("facts", scores, list("abcd"), np.zeros(4), sizes, answers, either=False, required=10)
    either = dataclasses.replace(one, kind="real", either=True, answers=answers[::-1])
    ranking = Ranking(0, (Head(0, 1),), 0.7, 0.0)
    for keep, kept in ((20, 0), (21, 1), (27, 1), (28, 2)):  # 10 required, then passages of 5, 6 and 7
        measured = learning.recall([one, either, either], ranking, keep)
        assert measured.kept == {"facts": (kept, 2), "real": (2 * min(kept, 1), 2)}
        assert measured.counts == (kept + 2 * min(kept, 1), 4)
    assert measured.balanced == 1.0
    partly = learning.recall([one, either, either], ranking, 21)
    assert partly.balanced == pytest.approx((0.5 + 1 + 0.5) / 3)  # the worst kind twice
    assert learning.recall([one], Ranking(0, (), 0.7, 0.0), 21).counts == (1, 2)


def test_words_outrank_heads_by_their_weight():
    (one,) = _recorded({(1, 2): 300.0}, 1, words=0.0)
    other = np.flatnonzero(~one.answers[0])[0]
    misled = dataclasses.replace(one, words=np.where(np.arange(40) == other, np.float32(100), 0))
    for weight, best in ((0.0, np.argmax(one.answers)), (0.7, other)):
        assert np.argmax(Ranking(1, (Head(1, 2),), weight, 0.2).ranks(misled)) == best


def test_the_passages_without_which_a_fact_is_lost():
    """A fact of 100 characters; passages that hold 4, 89 and 7 of them."""
    starts, ends = np.array([0, 54, 143]), np.array([54, 143, 300])
    assert recording._holders(starts, ends, (50, 150)).tolist() == [False, True, False]


def test_an_answer_in_many_passages_is_kept_with_all_of_them():
    """An answer of 300 characters in passages of 20, each of which holds less than a tenth of it."""
    starts = np.arange(0, 400, 20)
    holders = recording._holders(starts, starts + 20, (95, 395))
    assert np.flatnonzero(holders).tolist() == list(range(4, 20))


def test_repeated_passages_are_ranked_once():
    (one,) = _recorded({}, 1, 4)
    scores = np.zeros_like(one.scores)
    scores[0, 0] = [1, 8, 4, 2]
    repeated = dataclasses.replace(one, scores=scores, texts=["A lamp.", "rain", "a  LAMP.", "rain"])
    ranks = Ranking(0, (Head(0, 0),), 0.0, 0.0).ranks(repeated)
    assert np.isneginf(ranks).tolist() == [True, False, False, True]
    assert ranks[1] > ranks[2]


def test_the_passage_after_is_learned_from():
    """One head finds the passage before each answer; it is learned only where that counts."""
    made = _recorded({(1, 2): 300.0}, 30)
    after = [dataclasses.replace(one, answers=np.roll(one.answers, 1, axis=1)) for one in made]
    assert _places(learning.learn(after, 3, 0.7, 0.9), 0.5) == {(1, 2)}
    assert (1, 2) not in _places(learning.learn(after, 3, 0.7, 0.0), 0.5)


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


@pytest.mark.exhaustive
def test_calibration_is_deterministic_and_its_preset_can_be_used(smollm2, tmp_path: pathlib.Path):
    told: list[tuple[str, int, int]] = []
    runs = [calibrate.calibrate(smollm2, _PLAN, progress=lambda *stage: told.append(stage)) for _ in range(2)]
    assert runs[0] == runs[1]
    judged, preset = runs[0]
    assert [one.layer for one in judged] == [0, 1, 2, 3]
    assert [one.keep for one in judged[0].learned] == [64, 128]
    assert judged[0].learned[0].counts[1] == 6
    assert set(judged[0].learned[0].kept) == {"hidden_facts", "no_literal_match", "documents"}
    shares = [one.learned[-1].balanced for one in judged]
    chosen = next(layer for layer, share in enumerate(shares) if share >= _PLAN.target * max(shares))
    assert preset.default.filter_layer == chosen
    assert preset.default.heads == tuple(map(str, judged[chosen].learned[-1].ranking.heads))
    assert all(head.layer <= chosen for head in preset.default.chosen_heads)
    assert len(preset.default.recall_fit) == 3
    assert told[:3] == [("reading, train", 1, 9), ("reading, train", 2, 9), ("reading, train", 3, 9)]
    path = tmp_path / "preset.json"
    path.write_text(presets.write_preset(preset, smollm2.checkpoint.model.config))
    read = presets.read_preset(path, smollm2.checkpoint.model.config)
    assert read == preset
    example = next(HiddenFacts(count=1).examples(smollm2.checkpoint.tokenizer, 640))
    kept, _ = dataclasses.replace(smollm2, preset=read).select(example.text, example.question)
    assert kept.kept_tokens == 128
    assert 0 < kept.recall_estimate < 1
    plots.recall(judged, str(tmp_path / "recall.png"))
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("segment", [2304, 320])
def test_recorded_passages_are_the_filters_own(smollm2, segment):
    """Of some heads: the passages that they put first are those that the filter keeps, in one pass or in segments."""
    example = next(HiddenFacts(count=1).examples(smollm2.checkpoint.tokenizer, 600))
    heads = (Head(1, 5), Head(2, 0, 0.5))
    method = dataclasses.replace(
        smollm2.method(keep=128),
        filter_layer=2,
        heads=tuple(map(str, heads)),
        segment=segment,
        filter_precision="float",
    )
    one = recording.record(smollm2, example, method, layers=3)
    order = np.argsort(-Ranking(2, heads, method.lexical, method.carry).ranks(one), kind="stable")
    fits = one.required + np.cumsum(one.sizes[order]) <= 128
    kept, _ = smollm2.select(example.text, example.question, method=method)
    prompt = encode(smollm2.checkpoint.tokenizer, example.text, example.question, observation_rows=32)
    begins = prompt.prefix_length + np.cumsum(np.append(0, one.sizes))
    assert begins[-1] == len(prompt) - prompt.suffix_length
    assert fits.sum() > 1
    for chosen in order[fits]:
        assert set(range(begins[chosen], begins[chosen + 1])) <= set(kept.indices)
    assert not set(range(begins[order[-1]], begins[order[-1] + 1])) & set(kept.indices)


def test_questions_of_a_file_are_learned_from_and_measured_on_by_documents(smollm2, tmp_path: pathlib.Path):
    path = tmp_path / "questions.jsonl"
    told = [
        f"The lamp of number {number} is {colour}. " for number, colour in enumerate(("jade", "ochre", "teal", "puce"))
    ]
    lines = [
        {"input": one + "It rained. " * 9, "instructions": ["Which colour?"], "outputs": [one.split()[-1][:-1]]}
        for one in told
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan = dataclasses.replace(_PLAN, layers=1, train=1, held_out=1, questions=str(path))
    judged, preset = calibrate.calibrate(smollm2, plan, progress=lambda *_: None)
    assert judged[0].learned[-1].kept["real_questions"] == (2, 2)  # the documents fit the budget
    assert "heads learned on 5 other questions" in preset.source  # one of each built-in kind, two documents
    with pytest.raises(UserError, match=r"missing\.jsonl"):
        calibrate.calibrate(smollm2, dataclasses.replace(plan, questions="missing.jsonl"), progress=lambda *_: None)


def test_documents_that_come_with_the_package(smollm2):
    """Every answer stands verbatim once in its document, and no document, question or answer is in both splits."""
    seen: set[str] = set()
    for split in ("train", "held_out"):
        task = RealQuestions(questions_file=calibrate.documents_file(split))
        examples = list(task.examples(smollm2.checkpoint.tokenizer, 0))
        assert len(examples) == 48
        assert {example.group for example in examples} == {"verbatim"}
        assert {len(example.occurrences) for example in examples} == {1}
        texts = {example.text for example in examples}
        assert len(texts) == 8
        new = texts | {part for example in examples for part in (example.question, *example.references)}
        assert len(new) == 8 + 2 * 48
        assert not new & seen
        seen |= new


def test_questions_about_documents_are_different_ones_of_all_documents(smollm2):
    plan = dataclasses.replace(_PLAN, train=18, tokens=2048)
    asked = [one for kind, one in calibrate._examples(smollm2, plan, "train", None) if kind == "documents"]
    assert len({one.question for one in asked}) == 18
    assert sum(one.own[1] - one.own[0] < len(one.text) for one in asked) == 3
    counts = collections.Counter(one.name.partition(".")[0] for one in asked)
    assert sorted(counts.values()) == [2] * 6 + [3] * 2


def test_texts_longer_than_one_pass_are_refused(smollm2):
    with pytest.raises(UserError, match="tokens is 5000; the model reads 8192"):
        calibrate.calibrate(smollm2, dataclasses.replace(_PLAN, tokens=5000), progress=lambda *_: None)
