"""Text to tokens: the chat template around a document and a question, and what of it must always be kept.

Text that a user brings is data: whatever it says, its tokens are those of ordinary text. Markers that a family writes
as ordinary text, such as Mistral's first "[INST]", are no tokens of their own and stay as they are.
"""

import dataclasses
import functools
import itertools
import re

import numpy as np
from transformers import PreTrainedTokenizerBase

from gemfilter_jax.errors import UserError, reason
from gemfilter_jax.text import control_tokens

_SENTINEL = "\u2063content\u2063"  # stands for the message while the template is rendered; in no template
MESSAGE_FORMAT = "<text>\n{text}\n</text>\n\nAnswer from the text above: {question}"
"""How a document and a question become one message. The frame of a document that says "</text>" itself is numbered:
"<text-2>", or the first number that the document does not close."""

_FRAME = re.compile(r"(?<=<)text(?=>)|(?<=</)text(?=>)")

_SENTENCE_END = re.compile(r"""[.!?]["'”’)\]]*(?=\s)|[。！？]|\n(?=\s*\n)""")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A tokenized prompt that knows where its text is.

    Attributes:
      text: the document as given, to which offsets refer.
      ids: int32 [S].
      offsets: int64 [S, 2], characters of `text` that each token covers, without gaps between neighbours; empty for
        tokens of the template and the question.
      prefix_length: tokens before the document (the template's beginning).
      suffix_length: tokens after it (the question and the assistant header; without a question the last
        `window` tokens).
    """

    text: str
    ids: np.ndarray
    offsets: np.ndarray
    prefix_length: int
    suffix_length: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def required(self) -> np.ndarray:
        """bool [S], tokens that are always kept."""
        positions = np.arange(len(self))
        return (positions < self.prefix_length) | (positions >= len(self) - self.suffix_length)

    @functools.cached_property
    def sentences(self) -> np.ndarray:
        """int [S], the number of the sentence that each token begins in; blank lines end sentences too."""
        ends = [match.end() for match in _SENTENCE_END.finditer(self.text)]
        return np.searchsorted(ends, self.offsets[:, 0], side="right")

    def spans(self, indices: np.ndarray) -> list[tuple[int, int]]:
        """Character ranges of `text` that the tokens at increasing `indices` cover, neighbours merged."""
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
    window: int,
    chat_template: bool = True,
    message_format: str = MESSAGE_FORMAT,
) -> Prompt:
    """Tokenize a document and a question as one user message.

    Args:
      question: what is asked of the text; None if the text already ends in its question, whose last `window` tokens
        are then treated as the question.
      chat_template: wrap the message in the tokenizer's chat template, if it has one.
      message_format: holds {text} once and {question} after it, and before it too if wanted; used where there is a
        question.

    Raises:
      UserError: the text is empty or makes no tokens, or the message format lacks a place for the text or the question.
    """
    if not text.strip():
        raise UserError("the prompt is empty; give some text")
    before, after = _around(tokenizer, question, chat_template, _framing(text, message_format))
    whole = f"{before.text}{text}{after.text}"
    encoded = tokenizer(
        whole,
        add_special_tokens=not _has_template(tokenizer, chat_template),
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    encoded = control_tokens.spelled_out(tokenizer, whole, encoded, _brought(before, text, after))
    added = np.asarray(encoded["special_tokens_mask"], np.bool)
    if added.all():
        raise UserError("the prompt is empty: the tokenizer knows none of its characters")
    offsets = _without_gaps(np.asarray(encoded["offset_mapping"], np.int64), added, len(whole))
    first, last = len(before.text), len(before.text) + len(text)
    inside = (offsets[:, 0] >= first) & (offsets[:, 1] <= last) & (offsets[:, 1] > offsets[:, 0])
    places = np.flatnonzero(inside)
    head = int(places[0]) if len(places) else len(offsets)
    tail = len(offsets) - 1 - int(places[-1]) if len(places) else 0
    if question is None:
        tail = min(tail + window, len(offsets) - head)
    ids = np.asarray(encoded["input_ids"], np.int32)
    return Prompt(text, ids, np.clip(offsets - first, 0, len(text)), head, tail)


@dataclasses.dataclass(frozen=True)
class _Frame:
    """What stands before or after a document.

    Attributes:
      text: the whole of it.
      questions: (start, end) characters of it that the user wrote.
    """

    text: str
    questions: tuple[tuple[int, int], ...] = ()

    def after(self, text: str) -> "_Frame":
        """The same behind some text of the template."""
        return _Frame(text + self.text, tuple((len(text) + start, len(text) + end) for start, end in self.questions))


def check_format(tokenizer: PreTrainedTokenizerBase, chat_template: bool, message_format: str) -> None:
    """Raise a `UserError` if no prompt can be made with these settings; arguments as of `encode`."""
    _around(tokenizer, "?", chat_template, message_format)


def _framing(text: str, message_format: str) -> str:
    """The message format, the tags of `MESSAGE_FORMAT` numbered if the document holds the one that closes them."""
    if message_format != MESSAGE_FORMAT or "</text>" not in text.lower():
        return message_format
    number = next(number for number in itertools.count(2) if f"</text-{number}>" not in text.lower())
    return _FRAME.sub(f"text-{number}", message_format)


def _brought(before: _Frame, text: str, after: _Frame) -> list[tuple[int, int]]:
    """(start, end) characters of a prompt that the user brought: the document, and each place of the question."""
    first = len(before.text)
    last = first + len(text)
    return [*before.questions, (first, last), *((last + start, last + end) for start, end in after.questions)]


def _around(
    tokenizer: PreTrainedTokenizerBase, question: str | None, chat_template: bool, message_format: str
) -> tuple[_Frame, _Frame]:
    """What a prompt holds before and after its document; arguments and errors as of `encode`."""
    before, after = _template_around(tokenizer) if _has_template(tokenizer, chat_template) else ("", "")
    if question is None:
        return _Frame(before), _Frame(after)
    message_head, message_tail = _message_around(message_format, question)
    return message_head.after(before), _Frame(message_tail.text + after, message_tail.questions)


def _has_template(tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> bool:
    return chat_template and bool(tokenizer.chat_template)


def _message_around(message_format: str, question: str) -> tuple[_Frame, _Frame]:
    """What a message holds before and after the text."""
    head, text, tail = message_format.partition("{text}")
    if not text or "{question}" not in tail or "{text}" in tail:
        raise UserError(f"message format {message_format!r} must hold {{text}} once and {{question}} after it")
    if not question.strip():
        raise UserError("the question is empty; ask something, or leave it out")
    return _with_question(head, question), _with_question(tail, question)


def _with_question(part: str, question: str) -> _Frame:
    pieces, made, places = part.split("{question}"), "", []
    for piece in pieces[:-1]:
        made += piece
        places.append((len(made), len(made) + len(question)))
        made += question
    return _Frame(made + pieces[-1], tuple(places))


def _template_around(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template puts before and after a user's message, the assistant header included."""
    message = [{"role": "user", "content": _SENTINEL}]
    try:
        rendered = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program of its own, with errors of its own
        raise UserError(f"the tokenizer's chat template fails ({reason(error)}); turn it off") from error
    before, *after = rendered.split(_SENTINEL)
    if len(after) != 1:
        raise UserError(
            f"the tokenizer's chat template holds the user's message {len(after)} times, expected once; turn it off"
        )
    return before, after[0]


def _without_gaps(offsets: np.ndarray, added: np.ndarray, length: int) -> np.ndarray:
    """Let each token begin where the one before it ended, and the last end where the text does.

    Some tokenizers leave spaces, or marks that they compose with the letter before, out of their offsets. Tokens that
    the tokenizer `added` itself (bool [S]) stand for no text and are left out.
    """
    ends = np.maximum.accumulate(offsets[~added, 1])
    ends[-1:] = length
    starts = np.minimum(np.maximum.accumulate(offsets[~added, 0]), np.concatenate([[0], ends[:-1]]))
    joined = np.zeros_like(offsets)
    joined[~added] = np.stack([starts, ends], axis=1)
    return joined
