"""Properties of prompts' offsets, for both kinds of tokenizer and the chat templates of the supported families."""

import functools

import numpy as np
import pytest
from gguf_vocabularies import CONTROL, built, byte_level, sentencepiece, token_id
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizer_families import FAMILIES, tokenizers_of_families
from transformers import PreTrainedTokenizerBase

from gemfilter_jax.errors import UserError
from gemfilter_jax.text.prompt import Prompt, encode

_QUESTION = "Who left the harbour?"
_PARTS = [*" \n\t\r.1aehinst", "  ", "   ", " the", "ing", "\u00e9", "e\u0301", "\u4e2d\u6587", "\U0001f600", "\u00a0"]
_PARTS += ["\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u1100\u1161", "\u0915\u094d\u0937"]
_PARTS += ["\u2581", "\u200b", "\ufeff"]
_TEXTS = st.one_of(
    st.lists(st.sampled_from(_PARTS), min_size=1, max_size=20).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
).filter(str.strip)
_DOCUMENT = "The ship left  the harbour\n\n at dawn.\tNa\u00efve \U0001f6a2\u4e2d\u6587"


@functools.cache
def _appending(kind: str) -> PreTrainedTokenizerBase:
    """Without a chat template; puts a token before and after every text."""
    metadata = sentencepiece() if kind == "sentencepiece" else byte_level("qwen2", {"<s>": CONTROL, "</s>": CONTROL})
    for name, token in (("bos", "<s>"), ("eos", "</s>")):
        metadata |= {f"tokenizer.ggml.{name}_token_id": token_id(metadata, token)}
        metadata |= {f"tokenizer.ggml.add_{name}_token": True}
    return built(metadata)


def _check(prompt: Prompt, kept: np.ndarray) -> None:
    length = len(prompt.text)
    assert prompt.spans(np.arange(len(prompt))) == [(0, length)]
    edges = [edge for span in prompt.spans(kept) for edge in span]
    assert edges == sorted(set(edges))
    assert not edges or (edges[0] >= 0 and edges[-1] <= length)
    covered = 0
    for start, end in prompt.offsets.tolist():
        assert 0 <= start <= end <= length
        if start < end:
            assert start <= covered <= end  # nothing is left out between a token and those before it
            covered = end
    assert covered == length
    assert prompt.prefix_length + prompt.suffix_length <= len(prompt)


def _check_drawn(data: st.DataObject, tokenizer: PreTrainedTokenizerBase) -> None:
    text, question = data.draw(_TEXTS), data.draw(st.sampled_from([None, _QUESTION]))
    template = data.draw(st.booleans())
    assume(tokenizer(text, add_special_tokens=False)["input_ids"])
    prompt = encode(tokenizer, text, question, observation_rows=data.draw(st.integers(1, 8)), chat_template=template)
    _check(prompt, np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=len(prompt), max_size=len(prompt)))))


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=60, derandomize=True)
@given(data=st.data())
def test_offsets_with_each_template(family, data):
    _check_drawn(data, tokenizers_of_families()[family][0])


@pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])
@settings(deadline=None, max_examples=60, derandomize=True)
@given(data=st.data())
def test_offsets_where_tokens_are_put_around_the_text(kind, data):
    _check_drawn(data, _appending(kind))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(data=st.data())
def test_offsets_of_the_default_model(smollm2, data):
    _check_drawn(data, smollm2.checkpoint.tokenizer)


@pytest.mark.parametrize("question", [None, _QUESTION])
@pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])
def test_tokens_put_around_the_text_stand_for_none_of_it(kind, question):
    tokenizer = _appending(kind)
    prompt = encode(tokenizer, _DOCUMENT, question, observation_rows=2)
    assert prompt.ids[[0, -1]].tolist() == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert prompt.offsets[[0, -1]].tolist() == [[0, 0], [0, 0]]
    assert prompt.required[[0, -1]].all()
    if question is None:
        assert (prompt.prefix_length, prompt.suffix_length) == (1, 1 + 2)
        last = prompt.spans(np.arange(len(prompt) - 2, len(prompt)))
        assert last == [(len(_DOCUMENT) - 1, len(_DOCUMENT))]


@pytest.mark.parametrize("add_bos", [False, True])
def test_a_text_without_tokens_is_refused(add_bos):
    metadata = byte_level(specials={"<s>": CONTROL}, add_bos_token=add_bos)
    metadata["tokenizer.ggml.tokens"] = [f"no {token}" for token in metadata["tokenizer.ggml.tokens"]]
    tokenizer = built(metadata | {"tokenizer.ggml.merges": [], "tokenizer.ggml.bos_token_id": 0})
    with pytest.raises(UserError, match="the tokenizer knows none of its characters"):
        encode(tokenizer, "the", observation_rows=1)


def test_a_mark_composed_with_the_last_letter_is_not_lost():
    text = "cafe\u0301"
    prompt = encode(_appending("byte level"), text, observation_rows=1)
    assert prompt.spans(np.arange(len(prompt))) == [(0, len(text))]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_document_lies_between_the_templates_parts(family):
    tokenizer, before, after = tokenizers_of_families()[family]
    prompt = encode(tokenizer, _DOCUMENT, _QUESTION, observation_rows=4)
    head, tail = prompt.ids[: prompt.prefix_length].tolist(), prompt.ids[len(prompt) - prompt.suffix_length :].tolist()
    before, after = f"{before}<text>\n", f"\n</text>\n\nAnswer from the text above: {_QUESTION}{after}"
    decoded = [tokenizer.decode(ids) for ids in (head, tail)]
    if tokenizer.bos_token == "<s>" and family != "mistral nemo":
        # Sentencepiece puts spaces after special tokens, and Phi-3 drops the white space there.
        assert ["".join(part.split()) for part in decoded] == ["".join(part.split()) for part in (before, after)]
    else:
        assert decoded == [before, after]
    empty = prompt.offsets[:, 0] == prompt.offsets[:, 1]
    np.testing.assert_array_equal(empty, prompt.required)
    assert prompt.spans(np.flatnonzero(~prompt.required)) == [(0, len(_DOCUMENT))]


@pytest.mark.parametrize("text", ["the ship", "  the ship  ", "\n\nthe ship\n"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_alone_keeps_its_edges_and_the_templates_parts(family, text):
    """The template's last space may be one token with the text's first word; that token is kept too."""
    tokenizer, before, after = tokenizers_of_families()[family]
    prompt = encode(tokenizer, text, observation_rows=1)
    assert prompt.spans(np.arange(len(prompt))) == [(0, len(text))]
    bare = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before.rstrip(), after.lstrip())]
    assert prompt.ids[: len(bare[0])].tolist() == bare[0]
    assert prompt.ids[len(prompt) - len(bare[1]) :].tolist() == bare[1]
    assert prompt.prefix_length >= len(bare[0])
    assert prompt.suffix_length >= len(bare[1]) + 1
