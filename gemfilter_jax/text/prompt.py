"""Text to tokens: the chat template around a document and a question, and the tokens that must always be kept.

User text is data: it is always encoded as ordinary text. Markers that a model family writes as ordinary text, such as
the "[INST]" of the first Mistral models, are not control tokens and stay unchanged.
"""

import dataclasses
import functools
import itertools
import re

import numpy as np
from transformers import PreTrainedTokenizerBase

from gemfilter_jax.errors import UserError, check_text, is_fault, out_of_memory, reason
from gemfilter_jax.text import chat_template as chat_templates
from gemfilter_jax.text import chunking, control_tokens

MESSAGE_FORMAT = "<text>\n{text}\n</text>\n\nAnswer from the text above: {question}"
"""The message made of a document and a question. If the document contains "</text>", the tags are numbered: "<text-2>",
or the first number whose closing tag the document does not contain."""

_NUMBERED = re.compile(r"</text-([1-9][0-9]*)>")
_FRAME = re.compile(r"(?<=<)text(?=>)|(?<=</)text(?=>)")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A tokenized prompt with the character offsets of its tokens.

    Attributes:
      text: the document as given; offsets refer to it.
      ids: int32 [S].
      offsets: int64 [S, 2], character range of `text` that each token covers, without gaps between neighbours; empty
        for tokens of the template and the question.
      prefix_length: tokens before the document: the start of the template.
      suffix_length: tokens after the document: the question and the assistant header. Without a question, the
        document's last `observation_rows` tokens (see `encode`) and the assistant header.
      question: the question, or the text of the document's tokens that stand for it.
    """

    text: str
    ids: np.ndarray
    offsets: np.ndarray
    prefix_length: int
    suffix_length: int
    question: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def required(self) -> np.ndarray:
        """bool [S], tokens that are always kept."""
        positions = np.arange(len(self))
        return (positions < self.prefix_length) | (positions >= len(self) - self.suffix_length)

    @functools.cached_property
    def passages(self) -> np.ndarray:
        """int [S], index of the passage of the document in which each token begins, see `chunking.passage_ends`."""
        return np.searchsorted(chunking.passage_ends(self.text), self.offsets[:, 0], side="right")

    def spans(self, indices: np.ndarray) -> list[tuple[int, int]]:
        """Character ranges of `text` that the tokens at increasing `indices` cover; adjacent ranges are merged."""
        merged: list[tuple[int, int]] = []
        for start, end in self.offsets[indices].tolist():
            if start == end:
                continue
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((start, end))
        return merged


def encode(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    question: str | None = None,
    *,
    observation_rows: int,
    chat_template: bool = True,
    message_format: str = MESSAGE_FORMAT,
) -> Prompt:
    """Tokenize a document and a question as one user message.

    Args:
      question: question about the text; None if the text itself ends with the question. Its last `observation_rows`
        tokens are then treated as the question.
      chat_template: wrap the message in the tokenizer's chat template, if it has one.
      message_format: contains {text} once, {question} after it, and optionally {question} before it; used only with a
        question.

    Raises:
      UserError: the text or the question is no string or no Unicode, the text is empty or yields no tokens, or the
        message format lacks {text} or {question}.
    """
    check_text(text, "the text")
    check_text("" if question is None else question, "the question")
    if not text.strip():
        raise UserError("the prompt is empty; give some text")
    before, after = _around(tokenizer, question, chat_template, _framing(text, message_format))
    whole = f"{before.text}{text}{after.text}"
    try:
        encoded = tokenizer(
            whole,
            add_special_tokens=not _has_template(tokenizer, chat_template),
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
    except BaseException as error:
        if out_of_memory(error) or not is_fault(error):
            raise
        raise UserError(f"the tokenizer fails at this text ({reason(error)})") from error
    encoded = control_tokens.spelled_out(tokenizer, whole, encoded, _brought(before, text, after))
    added = np.asarray(encoded["special_tokens_mask"], np.bool)
    if added.all():
        raise UserError("the prompt is empty: the tokenizer knows none of its characters")
    offsets = _without_gaps(np.asarray(encoded["offset_mapping"], np.int64), added, len(whole))
    first, last = len(before.text), len(before.text) + len(text)
    inside = (offsets[:, 0] >= first) & (offsets[:, 1] <= last) & (offsets[:, 1] > offsets[:, 0])
    places = np.flatnonzero(inside)
    prefix_length = int(places[0]) if len(places) else len(offsets)
    suffix_length = len(offsets) - 1 - int(places[-1]) if len(places) else 0
    if question is None:
        suffix_length = min(suffix_length + observation_rows, len(offsets) - prefix_length)
    ids = np.asarray(encoded["input_ids"], np.int32)
    within = np.clip(offsets - first, 0, len(text))
    if question is None:
        question = text[within[len(ids) - suffix_length, 0] :] if suffix_length else ""
    return Prompt(text, ids, within, prefix_length, suffix_length, question)


@dataclasses.dataclass(frozen=True)
class _Frame:
    """The part of a prompt before or after the document.

    Attributes:
      text: the text of this part.
      questions: (start, end) character ranges of `text` that hold the question.
    """

    text: str
    questions: tuple[tuple[int, int], ...] = ()

    def after(self, text: str) -> "_Frame":
        """This part after some text of the template."""
        return _Frame(text + self.text, tuple((len(text) + start, len(text) + end) for start, end in self.questions))


def check_format(tokenizer: PreTrainedTokenizerBase, chat_template: bool, message_format: str) -> None:
    """Raise a `UserError` if no prompt can be made with these settings; arguments as in `encode`."""
    _around(tokenizer, "?", chat_template, message_format)


def _framing(text: str, message_format: str) -> str:
    """The message format, with the tags of `MESSAGE_FORMAT` numbered if the document contains the closing tag."""
    lowered = text.lower()
    if message_format != MESSAGE_FORMAT or "</text>" not in lowered:
        return message_format
    taken = set(_NUMBERED.findall(lowered))
    number = next(number for number in itertools.count(2) if str(number) not in taken)
    return _FRAME.sub(f"text-{number}", message_format)


def _brought(before: _Frame, text: str, after: _Frame) -> list[tuple[int, int]]:
    """(start, end) character ranges of user text in a prompt: the document, and each occurrence of the question."""
    first = len(before.text)
    last = first + len(text)
    return [*before.questions, (first, last), *((last + start, last + end) for start, end in after.questions)]


def _around(
    tokenizer: PreTrainedTokenizerBase, question: str | None, chat_template: bool, message_format: str
) -> tuple[_Frame, _Frame]:
    """The parts of a prompt before and after its document; arguments and errors as in `encode`."""
    before, after = chat_templates.around(tokenizer) if _has_template(tokenizer, chat_template) else ("", "")
    if question is None:
        return _Frame(before), _Frame(after)
    message_start, message_end = _message_around(message_format, question)
    return message_start.after(before), _Frame(message_end.text + after, message_end.questions)


def _has_template(tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> bool:
    return chat_template and bool(tokenizer.chat_template)


def _message_around(message_format: str, question: str) -> tuple[_Frame, _Frame]:
    """The parts of a message before and after the document."""
    start, text, end = message_format.partition("{text}")
    if not text or "{question}" not in end or "{text}" in end:
        raise UserError(f"message format {message_format!r} must hold {{text}} once and {{question}} after it")
    if not question.strip():
        raise UserError("the question is empty; ask something, or leave it out")
    return _with_question(start, question), _with_question(end, question)


def _with_question(part: str, question: str) -> _Frame:
    pieces, made, places = part.split("{question}"), "", []
    for piece in pieces[:-1]:
        made += piece
        places.append((len(made), len(made) + len(question)))
        made += question
    return _Frame(made + pieces[-1], tuple(places))


def _without_gaps(offsets: np.ndarray, added: np.ndarray, length: int) -> np.ndarray:
    """Let each token begin where the previous one ends, and the last token end with the text.

    Some tokenizers omit spaces from their offsets, or marks that they compose with the previous letter. Tokens that the
    tokenizer `added` (bool [S]) cover no text and get empty offsets.
    """
    ends = np.maximum.accumulate(offsets[~added, 1])
    ends[-1:] = length
    starts = np.minimum(np.maximum.accumulate(offsets[~added, 0]), np.concatenate([[0], ends[:-1]]))
    joined = np.zeros_like(offsets)
    joined[~added] = np.stack([starts, ends], axis=1)
    return joined
