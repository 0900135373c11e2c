"""Work on a text takes time in proportion to its length, whatever the text is."""

import itertools
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hostile.long_texts import DATA

from gemfilter_jax.checkpoints import open_checkpoint
from gemfilter_jax.methods import lexical, passages
from gemfilter_jax.reporting import prompt_page
from gemfilter_jax.text import chunking
from gemfilter_jax.text.prompt import encode

_QUESTION = "What is the value of a word x, 7 or 今天天气很好?"


def _seconds(work: Callable[[str], object], text: str, runs: int = 2) -> float:
    """Processor time, which other processes add little to; the least of several runs has the least noise."""
    found = []
    for _ in range(runs):
        begun = time.process_time()
        work(text)
        found.append(time.process_time() - begun)
    return min(found)


def _takes_linear_time(work: Callable[[str], object], name: str, length: int) -> None:
    """Four times the length is four times the work, 16 times if it is quadratic.

    Memory that no longer fits the caches, and other work on the machine, make it up to nine times. Below some
    milliseconds, the clock and what is done once count most; what is quadratic takes far more than that.
    """
    short, long = (_seconds(work, DATA[name](times * length)) for times in (1, 4))
    assert long < 12 * max(short, 0.02), (short, long)


def _passages(text: str) -> list[str]:
    return [text[start:end] for start, end in itertools.pairwise([0, *chunking.passage_ends(text).tolist()])]


def _rank(text: str) -> None:
    found = _passages(text)
    passages.once(lexical.scores(found, _QUESTION), found)


def _report(text: str) -> None:
    spans = list(itertools.pairwise([0, *chunking.passage_ends(text).tolist()]))[::2]
    kept: Any = types.SimpleNamespace(prompt=text, spans=spans, kept_tokens=1, prompt_tokens=2)
    prompt_page.page(kept, _QUESTION)


@pytest.mark.parametrize("name", DATA)
def test_lengths(name):
    for length in (100, 1_000, 10_001):
        assert len(DATA[name](length)) == length


@pytest.mark.parametrize("name", DATA)
def test_passages(name):
    _takes_linear_time(chunking.passage_ends, name, 100_000)


@pytest.mark.exhaustive
@pytest.mark.parametrize("work", [_rank, _report])
@pytest.mark.parametrize("name", DATA)
def test_what_is_made_of_passages(name, work):
    _takes_linear_time(work, name, 100_000)


@pytest.mark.parametrize("name", [name for name, text in DATA.items() if text(100).strip()])
def test_prompts(name):
    tokenizer = open_checkpoint("smollm2").tokenizer()

    def work(text: str) -> None:
        prompt = encode(tokenizer, text, _QUESTION, observation_rows=0)
        assert prompt.spans(np.arange(len(prompt))) == [(0, len(text))]

    _takes_linear_time(work, name, 50_000)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", DATA)
def test_ten_million_characters(name):
    assert _seconds(chunking.passage_ends, DATA[name](10_000_000), runs=1) < 10
