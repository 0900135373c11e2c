"""How documents are cut into segments: always to an end, every token once, no piece beyond its room."""

import dataclasses

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from gemfilter_jax.errors import UserError
from gemfilter_jax.methods.gemfilter import segments
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.text.prompt import Prompt

_METHOD = GemFilter(filter_layer=1, keep=16)


def _prompt(document: int, prefix: int, suffix: int, sentence: int) -> Prompt:
    """A prompt of one-character tokens whose sentences have `sentence` tokens; a mark, a space, and the next one."""
    text = ("x" * max(sentence - 2, 0) + ". ")[-sentence:] * (document // sentence + 1)
    offsets = [(0, 0)] * prefix + [(at, at + 1) for at in range(document)] + [(document, document)] * suffix
    return Prompt(text[:document], np.zeros(len(offsets), np.int32), np.array(offsets), prefix, suffix)


def _check(config, prompt: Prompt, method: GemFilter, rows: np.ndarray) -> None:
    limit = segments.reach(config, method)
    pieces = segments.pieces(config, prompt, rows, method)
    document = rows[prompt.prefix_length : len(rows) - prompt.suffix_length]
    np.testing.assert_array_equal(np.concatenate(pieces), document)
    assert all(len(piece) > 0 for piece in pieces)
    assert all(prompt.prefix_length + len(piece) + prompt.suffix_length <= limit for piece in pieces)


def _fits(prompt: Prompt, method: GemFilter) -> bool:
    try:
        segments.check_room(tiny.CONFIG, prompt, method)
    except UserError:
        return False
    return True


def test_a_question_that_leaves_less_room_than_a_chunk_is_refused():
    prompt = _prompt(500, 20, 180, 100)
    with pytest.raises(UserError, match=r"take 200 tokens, which leaves no room for a chunk .* in a segment of 256"):
        segments.check_room(tiny.CONFIG, prompt, dataclasses.replace(_METHOD, segment=256))


@settings(max_examples=300, deadline=2000)
@given(
    document=st.integers(1, 3000),
    prefix=st.integers(0, 20),
    suffix=st.integers(1, 260),
    sentence=st.integers(1, 90),
    chunk=st.integers(1, 70),
    segment=st.integers(8, 256),
    sentences=st.booleans(),
    dropped=st.floats(0, 0.9),
)
def test_every_token_is_in_one_segment_or_the_prompt_is_refused(
    document, prefix, suffix, sentence, chunk, segment, sentences, dropped
):
    prompt = _prompt(document, prefix, suffix, sentence)
    method = dataclasses.replace(_METHOD, chunk=chunk, segment=segment, sentences=sentences)
    if not _fits(prompt, method):
        return
    _check(tiny.CONFIG, prompt, method, np.arange(len(prompt)))
    left = np.random.default_rng(document).random(len(prompt)) >= dropped  # as after a round
    rows = np.flatnonzero(prompt.required | left)
    if len(rows) > prompt.prefix_length + prompt.suffix_length:
        _check(tiny.CONFIG, prompt, method, rows)


@pytest.mark.parametrize("document", range(1000, 1041))
def test_a_question_that_leaves_room_for_little_more_than_a_chunk(document):
    """The default model's context, and a template and a question of about 4,440 tokens."""
    config = dataclasses.replace(tiny.CONFIG, context=8192)
    _check(config, *(prompt := _prompt(document, 30, 4410, 100), _METHOD), np.arange(len(prompt)))


def test_a_question_of_100_tokens_in_segments_of_256():
    method = dataclasses.replace(_METHOD, segment=256)
    config = dataclasses.replace(tiny.CONFIG, context=8192)
    for document in range(160, 700):
        _check(config, *(prompt := _prompt(document, 30, 100, 100), method), np.arange(len(prompt)))
