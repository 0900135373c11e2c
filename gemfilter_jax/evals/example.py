"""A question about a long text, and what became of it."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_count(tokenizer: "PreTrainedTokenizerBase", text: str) -> int:
    """Length of a text in tokens, without special tokens."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@dataclasses.dataclass(frozen=True)
class Example:
    """A question about a long text.

    Attributes:
      name: short name for reports.
      text: the long text, without the question.
      question: question about one fact or several.
      references: the expected answers: one for each fact, or alternatives, as the task says.
      tokens: approximate length of `text` in tokens.
      spans: the passages of `text` that hold the references, as character offsets [start, end); empty if unknown.
        If there are as many as references, each holds the reference of the same index.
      group: the part of the task that the example belongs to, see `Task.parts`; also counted apart.
      message_format: see `prompt.encode`; None for the pipeline's own.
      plain: whether the prompt is never wrapped in a chat template.
    """

    name: str
    text: str
    question: str
    references: tuple[str, ...]
    tokens: int
    spans: tuple[tuple[int, int], ...] = ()
    group: str = ""
    message_format: str | None = None
    plain: bool = False

    @property
    def depth(self) -> float | None:
        """Relative position of the first span: 0 at the start of the text, 1 at its end; None without spans."""
        return min(self.spans)[0] / len(self.text) if self.spans else None

    @property
    def digest(self) -> str:
        """16 hexadecimal digits, equal for equal examples."""
        return hashlib.blake2b(ascii(dataclasses.astuple(self)).encode(), digest_size=8).hexdigest()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The answer to an example, and its scores.

    Attributes:
      answer: the model's text.
      scores: the task's scores of the answer and, where the method keeps text, of what it kept.
      prompt_tokens: tokens of the whole prompt.
      recall_estimate: see `pipeline.KeptText`.
      timings: seconds per stage; see `pipeline.Result`.
      error: why there is no answer; None if there is one.
    """

    answer: str = ""
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    prompt_tokens: int | None = None
    timings: Mapping[str, float] = dataclasses.field(default_factory=dict)
    recall_estimate: float | None = None
    error: str | None = None
