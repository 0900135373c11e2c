"""Passages ranked by several heads and by words: the ranks, the probabilities, and the passes that score."""

import dataclasses

import bounds
import numpy as np
import pytest
import tiny

from gemfilter_jax.buckets import buckets_to
from gemfilter_jax.methods import lexical, passages
from gemfilter_jax.methods.gemfilter import fusion, scoring_pass
from gemfilter_jax.methods.gemfilter.method import GemFilter, Head
from gemfilter_jax.text.prompt import Prompt

_METHOD = GemFilter(filter_layer=2, keep=64, heads=("0/1", "2/3:0.5"), lexical=0.0, carry=0.0, chunk=8, sentences=False)
_FIRST = np.array([0, 3, 5, 9])
_TEXTS = ["the red lamp", "a door", "the blue lamp of Ada", "rain"]


def _scores(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).exponential(size=(2, 12)).astype(np.float32)


def _ranks(scores: np.ndarray, question: str = "?", *, lexical_weight: float = 0.0) -> np.ndarray:
    words = np.float32(lexical_weight) * lexical.scores(_TEXTS, question)
    return fusion.ranking(scores, _FIRST, words, _METHOD)


def test_a_rank_is_the_weighted_mean_of_standardised_logarithms():
    scores = _scores()
    means = np.log([[row[start:stop].mean() for start, stop in ((0, 3), (3, 5), (5, 9), (9, 12))] for row in scores])
    standard = [(row - np.mean(row)) / np.std(row) for row in means]
    want = (standard[0] + 0.5 * standard[1]) / 1.5
    # float32 logarithms, standardised: a few units in the last place of numbers below 4.
    np.testing.assert_allclose(_ranks(scores), want, rtol=0, atol=4 * 8 * 2**-23 * np.abs(means).max())


def test_the_scale_of_a_head_does_not_matter():
    scores = _scores()
    scaled = scores * np.array([[2.0**20], [2.0**-20]], np.float32)
    np.testing.assert_allclose(_ranks(scaled), _ranks(scores), rtol=0, atol=64 * 20 * 2**-23)


def test_words_are_added():
    question = "Who owns the blue lamp?"
    both = _ranks(_scores(), question, lexical_weight=0.7)
    words = lexical.scores(_TEXTS, question)
    np.testing.assert_allclose(both, _ranks(_scores(), question) + 0.7 * words, rtol=1e-5)
    assert np.argmax(words) == 2


def test_a_passage_gets_a_part_of_the_score_of_the_one_before():
    """But not of one that is not next to it in the document, as after a round."""
    ranks, numbers = np.array([1.0, -2.0, 4.0, 8.0], np.float32), np.array([0, 1, 2, 5])
    assert fusion.carried(ranks, numbers, 0.25).tolist() == [1.0, -1.75, 3.5, 8.0]
    assert fusion.carried(ranks, numbers, 0.0).tolist() == ranks.tolist()
    both = fusion.carried(np.stack([ranks, -ranks]), numbers, 0.25)
    assert both.tolist() == [[1.0, -1.75, 3.5, 8.0], [-1.0, 1.75, -3.5, -8.0]]


def test_heads_that_see_no_difference_say_nothing():
    assert not _ranks(np.ones((2, 12), np.float32)).any()


def test_a_passage_that_no_head_looks_at_stays_in_sight():
    """A score of 0 has no logarithm; it counts as a billionth of the best."""
    scores = _scores()
    scores[:, 3:5] = 0
    ranks = _ranks(scores)
    assert np.isfinite(ranks).all()
    assert np.argmin(ranks) == 1


def test_what_is_not_a_number_counts_as_nothing():
    scores = _scores()
    scores[0, 4] = np.nan
    ranks = _ranks(scores)
    assert np.isfinite(ranks).all()


def _document(passages: int) -> tuple[Prompt, np.ndarray]:
    """A prompt whose passages are of 8 tokens, and a score of one head for each of its tokens."""
    prompt = tiny.prompt_of(np.arange(7 + 8 * passages + 10, dtype=np.int32), 7, 10)
    scores = np.zeros((1, len(prompt)), np.float32)
    scores[0, 7:-10] = np.exp(np.repeat(np.random.default_rng(0).normal(size=passages), 8))
    return prompt, scores


def test_the_passage_after_the_best_one_is_kept_rather_than_others_like_it():
    prompt = tiny.prompt_of(np.arange(7 + 8 * 20 + 10, dtype=np.int32), 7, 10)
    scores = np.ones((2, len(prompt)), np.float32)
    scores[:, 7 + 8 * 12 : 7 + 8 * 13] = 2
    method = dataclasses.replace(_METHOD, keep=17 + 16, carry=0.2, order="text")
    (choice,) = fusion.kept([scores], [prompt], [np.arange(len(prompt))], method)
    assert choice.rows.tolist() == [*range(7), *range(7 + 8 * 12, 7 + 8 * 14), *range(167, 177)]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("sharpness", [0.5, 3.0])
def test_the_share_is_that_of_the_probability(share, sharpness):
    """The fewest passages that hold the share of softmax(sharpness * rank) are kept, rounded up to a bucket."""
    prompt, scores = _document(60)
    method = dataclasses.replace(
        _METHOD, heads=("2/0",), keep=512, least=1, order="text", recall=share, sharpness=sharpness
    )
    none = np.zeros(60, np.float32)
    ranks = fusion.ranking(scores[:, 7:-10], np.arange(0, 480, 8), none, method)
    likely = np.sort(np.exp(sharpness * ranks.astype(np.float64)))[::-1]
    held = np.cumsum(np.repeat(likely / 8, 8)) / likely.sum()
    wanted = 17 + 1 + int(np.searchsorted(held, share, side="left"))
    (choice,) = fusion.kept([scores], [prompt], [np.arange(len(prompt))], method)
    kept = choice.rows
    sizes = buckets_to(512)
    assert len(kept) == min(len(prompt), next(size for size in sizes if size >= wanted))
    whole = (len(kept) - 17) // 8
    best = set(np.argsort(-ranks)[:whole].tolist())
    of_kept = held[len(kept) - 17 - 1]
    np.testing.assert_allclose(choice.share, of_kept, rtol=512 * 2**-23)  # a sum of so many float32 numbers
    assert choice.passages == 60
    assert best <= set(((kept[(kept >= 7) & (kept < 487)] - 7) // 8).tolist())


@pytest.mark.parametrize("better", [0, 2])
def test_passages_with_the_same_text_are_kept_once(better):
    """The one that ranks higher, or the first; the other comes after all else."""
    text = "The lamp is red today. A door is open there. THE LAMP  is red today. It rained all day."
    ends = [text.index(". ", start) + 1 for start in (0, 24, 46)] + [len(text)]
    offsets = [(0, 0), *zip([0, *ends[:-1]], ends, strict=True), (len(text), len(text))]
    prompt = Prompt(text, np.arange(6, dtype=np.int32), np.array(offsets), 1, 1, "?")
    scores = np.array([[0, 2, 1, 2, 1, 0]], np.float32)
    scores[0, 1 + better] += 1
    method = dataclasses.replace(_METHOD, heads=("2/0",), chunk=8, sentences=True, order="text")
    kept = [
        fusion.kept([scores], [prompt], [np.arange(6)], dataclasses.replace(method, keep=keep))[0].rows.tolist()
        for keep in (3, 5)
    ]
    assert kept == [[0, 1 + better, 5], sorted({0, 1 + better, 2, 4, 5})]


def test_the_template_gives_way_where_it_is_not_required():
    prompt, scores = _document(6)
    method = dataclasses.replace(_METHOD, heads=("2/0",), keep=40, keep_required=False, order="text")
    (choice,) = fusion.kept([scores], [prompt], [np.arange(len(prompt))], method)
    kept = choice.rows
    assert not prompt.required[kept].any()


def test_a_prompt_that_is_all_question_has_no_passages():
    prompt = tiny.prompt_of(np.arange(20, dtype=np.int32), 5, 15)
    method = dataclasses.replace(_METHOD, heads=("2/0",), keep=16, keep_required=False, order="text")
    (choice,) = fusion.kept([np.zeros((1, 20), np.float32)], [prompt], [np.arange(20)], method)
    assert len(choice.rows) == 16


def test_words_are_those_of_the_whole_document_in_every_round():
    """Of passages that are left over in a further round, words and neighbours count as they did in the first."""
    text = "The lamp is red. A door is open. The lamp of Ada is blue. It rained all day."
    ends = [text.index(". ", start) + 1 for start in (0, 17, 33)] + [len(text)]
    offsets = [(0, 0), *zip([0, *ends[:-1]], ends, strict=True), (len(text), len(text))]
    prompt = Prompt(text, np.arange(6, dtype=np.int32), np.array(offsets), 1, 1, "Whose lamp is blue?")
    rule = passages.PassageRule(keep=6, chunk=8, sentences=True, order="text")
    method = dataclasses.replace(_METHOD, lexical=0.7)
    every, some = (passages.listed(prompt, rule, np.array(rows)) for rows in ([0, 1, 2, 3, 4, 5], [0, 1, 3, 5]))
    assert len(every.texts) == 4
    assert some.texts == [every.texts[0], every.texts[2]]
    of_every, of_some = (fusion.words(prompt, rule, listed, method) for listed in (every, some))
    assert of_every[1] > 0  # beside both lamps
    np.testing.assert_array_equal(of_some, of_every[[0, 2]])


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("tri_shape", [False, True])
def test_each_weighting_scores_as_its_head_does_alone(tri_shape, count):
    """One pass that looks at heads of layers 0, 1 and 3, or of layer 0 alone, and a pass up to the layer of each."""
    prompt = tiny.prompt_of(tiny.random_ids(120, 3), 7, 10)
    places = (Head(0, 1), Head(1, 2), Head(3, 0))[:count]
    attention = {"filter_attention": "tri_shape", "band": 24, "first_tokens": 5} if tri_shape else {}
    base = dataclasses.replace(_METHOD, normalisation="sink", filter_attention="dense") if not tri_shape else _METHOD
    base = dataclasses.replace(base, normalisation="sink", **attention)

    def scored(method: GemFilter) -> np.ndarray:
        asked = {"whole": True, "document": len(prompt), "width": 128}
        return scoring_pass.scores(tiny.decoder(), [prompt.ids], [prompt], method, **asked)[0, :, : len(prompt)]

    together = scored(dataclasses.replace(base, filter_layer=3, heads=tuple(map(str, places))))
    assert together.shape == (count, len(prompt))
    assert together.all()
    for row, place in zip(together, places, strict=True):
        weights = tuple(float(head == place.head) for head in range(tiny.CONFIG.heads))
        alone = scored(dataclasses.replace(base, filter_layer=place.layer, heads=None, head_weights=weights))[0]
        np.testing.assert_allclose(row, alone, rtol=0, atol=bounds.of_decoder(tiny.CONFIG, 120, np.abs(alone).max()))


@pytest.mark.parametrize(
    ("text", "head"),
    [("17/0", Head(17, 0)), ("0/3:0.5", Head(0, 3, 0.5)), ("2/1:2", Head(2, 1, 2.0)), ("2/1:1", Head(2, 1))],
)
def test_heads_are_written_and_read(text, head):
    assert Head.parse(text) == head
    assert Head.parse(str(head)) == head


@pytest.mark.parametrize(
    "text", ["", "3", "3/", "/3", "3/1:", "3/1:0", "3/1:-1", "-3/1", "3/1:nan", "3/1 ", "٣/1", "a/b"]
)
def test_what_is_no_head(text):
    assert Head.parse(text) is None
