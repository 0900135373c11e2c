"""Methods without a model: what they keep, by definition."""

import collections
import dataclasses
import math

import numpy as np
import pytest
import tiny

from gemfilter_jax.methods.bm25 import BM25
from gemfilter_jax.methods.first_last import FirstLast
from gemfilter_jax.methods.presets import preset_for
from gemfilter_jax.methods.random_passages import RandomPassages
from gemfilter_jax.timing import Stopwatch

PASSAGES = ["The cat sat on the mat.", "A dog, a cat and a 7.", "Nothing of it here.", "Room 7, room 7: the DOG!", ""]
QUESTION = "the dog in room 7"
TWICE = "the room, the dog, the dog"


@pytest.fixture(scope="module")
def model():
    return tiny.pipeline(tiny.decoder())


def by_definition(passages: list[str], question: str) -> list[float]:
    """BM25 as Lucene computes it, k1 = 1.5 and b = 0.75, without its constant factor k1 + 1."""
    words = [[word.strip(".,:!").lower() for word in one.split()] for one in passages]
    mean = sum(map(len, words)) / len(words)
    scores = []
    for own in words:
        counts, score = collections.Counter(own), 0.0
        for word in question.replace(",", "").split():
            having = sum(word in other for other in words)
            rarity = math.log(1 + (len(words) - having + 0.5) / (having + 0.5))
            score += rarity * counts[word] / (counts[word] + 1.5 * (0.25 + 0.75 * len(own) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize("question", [QUESTION, TWICE], ids=["words", "words said twice"])
def test_bm25(question):
    prompt = dataclasses.replace(tiny.prompt_of(tiny.random_ids(9)), question=question)
    scores, expected = BM25().scores(prompt, PASSAGES), by_definition(PASSAGES, question)
    assert int(np.argmax(scores)) == int(np.argmax(expected)) == 3
    np.testing.assert_allclose(np.divide(scores, scores[3]), np.divide(expected, expected[3]), rtol=1e-5)


@pytest.mark.parametrize("question", ["", "?!", "zebra"])
def test_bm25_of_a_question_without_known_words_ranks_nothing(question):
    prompt = dataclasses.replace(tiny.prompt_of(tiny.random_ids(9)), question=question)
    assert not BM25().scores(prompt, PASSAGES).any()


def test_whole_chunks_are_kept_beside_the_question_and_the_best_comes_last(model):
    """The eighth chunk of eight words has the question's word, the third has it among others."""
    words = ["w1"] * 200
    words[56:64] = ["w7"] * 8
    words[16] = "w7"
    method = BM25(keep=8 + 8 + 2, chunk=8, sentences=False)
    prompt = model._encode(" ".join(words), "w7 w8", method)
    kept = method.select(model.checkpoint.model, [prompt], watch=Stopwatch())[0].indices
    assert kept.tolist() == [*range(16, 24), *range(56, 64), 200, 201]


def test_settings_of_passages_are_the_presets():
    preset = preset_for(tiny.CONFIG)
    preset = dataclasses.replace(preset, default=dataclasses.replace(preset.default, chunk=17, order="text", keep=99))
    assert BM25.of("bm25", preset) == BM25(keep=99, chunk=17, order="text")
    assert BM25.of("bm25", preset, chunk=5).chunk == 5


def test_first_and_last():
    prompt = tiny.prompt_of(tiny.random_ids(50), prefix=2, suffix=3)
    assert FirstLast(keep=12).kept(prompt).tolist() == [0, 1, *range(2, 6), *range(44, 47), 47, 48, 49]


def test_draws_differ_by_seed_and_prompt():
    prompts = [tiny.prompt_of(tiny.random_ids(50, seed)) for seed in range(2)]
    drawn = [RandomPassages(draw=draw).scores(prompt, [""] * 400) for draw in range(2) for prompt in prompts]
    assert len({tuple(scores) for scores in drawn}) == 4
    again = RandomPassages().scores(prompts[0], [""] * 400)
    np.testing.assert_array_equal(again, drawn[0])
    assert abs(np.mean(again) - 0.5) < 8 * np.sqrt(1 / 12 / 400)  # eight standard errors of uniform draws
