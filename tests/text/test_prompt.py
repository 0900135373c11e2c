"""Prompts: where the template, the text and the question lie, and which characters a kept token stands for."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from gemfilter_jax.errors import UserError
from gemfilter_jax.text.prompt import Prompt, encode

_TEXT = "The ship left the harbour  at dawn.\n\nNobody saw the na\u00efve captain; \U0001f6a2\u4e2d\u6587 were on it."
_QUESTION = "Who left the harbour?"
_FORMAT = "Read:\n{text}\nAnd say: {question}"
_SPECIALS = ["<|start|>", "<|end|>"]
_CHAT = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
_BEFORE, _AFTER = "<|start|>user\n", "<|end|>\n<|start|>assistant\n"


@functools.cache
def _tokenizer(trim_offsets: bool = False, chat_template: str = _CHAT) -> PreTrainedTokenizerFast:
    """Byte-level, trained on plain letters: the rarer characters of the text fall apart into bytes."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=_SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([_QUESTION, "The harbour at dawn. Nobody left the ship; the captain saw it."], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=_SPECIALS, chat_template=chat_template
    )


def _encode(text: str = _TEXT, question: str | None = _QUESTION, *, trim_offsets: bool = False, **options) -> Prompt:
    return encode(
        _tokenizer(trim_offsets), text, question, **{"observation_rows": 4, "message_format": _FORMAT} | options
    )


def _characters(prompt: Prompt, before: str) -> list[set[int]]:
    """The characters of the text that each token holds a byte of, found by laying the tokens' bytes end to end."""
    character_of_byte = [place for place, letter in enumerate(before + prompt.text) for _ in letter.encode()]
    characters, at = [], 0
    for token in _tokenizer().convert_ids_to_tokens(prompt.ids.tolist()):
        inside = character_of_byte[at : at + len(token)]
        characters.append({place - len(before) for place in inside if place >= len(before)})
        at += len(token)
    return characters


def _decoded(ids: np.ndarray) -> str:
    return _tokenizer().decode(ids.tolist())


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("question", [None, _QUESTION])
@pytest.mark.parametrize("chat_template", [False, True])
def test_prefix_and_suffix_are_the_template_and_the_question(chat_template, question, trim_offsets):
    prompt = _encode(question=question, chat_template=chat_template, trim_offsets=trim_offsets)
    before, after = (_BEFORE, _AFTER) if chat_template else ("", "")
    tail = prompt.suffix_length
    if question is None:
        tail -= 4
    else:
        before, after = before + "Read:\n", "\nAnd say: " + question + after
    assert _decoded(prompt.ids) == before + _TEXT + after
    assert _decoded(prompt.ids[: prompt.prefix_length]) == before
    assert _decoded(prompt.ids[len(prompt) - tail :]) == after
    places = np.arange(len(prompt))
    np.testing.assert_array_equal(
        prompt.required, (places < prompt.prefix_length) | (places >= len(prompt) - prompt.suffix_length), strict=True
    )


def test_template_and_question_cover_no_text():
    prompt = _encode()
    empty = prompt.offsets[:, 0] == prompt.offsets[:, 1]
    np.testing.assert_array_equal(empty, prompt.required)


def test_a_text_shorter_than_the_window_is_required_whole():
    prompt = _encode("ship", None, observation_rows=50)
    assert prompt.required.all()
    assert prompt.prefix_length + prompt.suffix_length == len(prompt)


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("chat_template", [False, True])
@pytest.mark.parametrize("text", [_TEXT, " \n The ship ", "\n\nship\n\n", "\U0001f6a2", "\u4e2d\u6587\u00ef"])
def test_all_tokens_together_are_the_text(text, chat_template, trim_offsets):
    for question in (None, _QUESTION):
        prompt = _encode(text, question, chat_template=chat_template, trim_offsets=trim_offsets)
        assert prompt.spans(np.arange(len(prompt))) == [(0, len(text))]


def test_characters_of_several_tokens_belong_to_each_of_them():
    prompt = _encode()
    ship = _TEXT.index("\U0001f6a2")
    tokens = [i for i, (start, end) in enumerate(prompt.offsets.tolist()) if start <= ship < end]
    assert len(tokens) > 1
    for token in tokens:
        (span,) = prompt.spans(np.array([token]))
        assert span[0] <= ship < span[1]


@pytest.mark.parametrize("trim_offsets", [False, True])
@settings(deadline=None, max_examples=60, derandomize=True)
@given(data=st.data())
def test_spans_are_the_characters_of_the_kept_tokens(trim_offsets, data):
    letters = st.sampled_from([*"aehipst .\n", "ship", " the", "\u00ef", "\u4e2d", "\U0001f6a2"])
    text = data.draw(st.lists(letters, min_size=1, max_size=12).map("".join).filter(str.strip))
    prompt = _encode(text, trim_offsets=trim_offsets)
    kept = np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=len(prompt), max_size=len(prompt))))
    spans = prompt.spans(kept)
    edges = [edge for span in spans for edge in span]
    assert edges == sorted(set(edges))
    assert all(0 <= edge <= len(text) for edge in edges)
    characters = _characters(prompt, _BEFORE + "Read:\n")
    want = set().union(*(characters[i] for i in kept))
    assert {place for start, end in spans for place in range(start, end)} == want


def test_a_question_may_hold_braces():
    prompt = _encode(question="What is {text} in {question}?", chat_template=False)
    assert _decoded(prompt.ids) == f"Read:\n{_TEXT}\nAnd say: What is {{text}} in {{question}}?"


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_an_empty_text_is_refused(text):
    with pytest.raises(UserError, match="prompt is empty"):
        _encode(text)


@pytest.mark.parametrize("question", ["", " \n"])
def test_an_empty_question_is_refused(question):
    with pytest.raises(UserError, match="question is empty"):
        _encode(question=question)


@pytest.mark.parametrize("message_format", ["", "{text}", "{question}", "{question} {text}", "{text}{text}{question}"])
def test_a_bad_message_format_is_refused(message_format):
    with pytest.raises(UserError, match=r"message format .* \{text\} once and \{question\} after it"):
        _encode(message_format=message_format)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("<|start|>assistant\n", "message 0 times"),
        ("{{ messages[0]['content'] }}{{ messages[0]['content'] }}", "message 2 times"),
        ("{{ raise_exception('no users') }}", "no users"),
        ("{% if %}", "chat template fails"),
    ],
)
def test_a_template_that_does_not_hold_the_message_once_is_refused(template, words):
    tokenizer = _tokenizer(chat_template=template)
    with pytest.raises(UserError, match=words) as error:
        encode(tokenizer, _TEXT, _QUESTION, observation_rows=4)
    assert "\n" not in str(error.value)
    assert encode(tokenizer, _TEXT, _QUESTION, observation_rows=4, chat_template=False).prefix_length > 0
