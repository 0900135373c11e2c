"""A question about a long text, and what became of it."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Example:
    """A question about a long text.

    Attributes:
      name: short name for reports.
      text: the long text, without the question.
      question: question about one fact or several.
      references: the expected answers, one for each fact.
      tokens: approximate length of `text` in tokens.
      spans: the passages of `text` that hold the references, as character offsets [start, end); empty if unknown.
    """

    name: str
    text: str
    question: str
    references: tuple[str, ...]
    tokens: int
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def depth(self) -> float | None:
        """Relative position of the first span: 0 at the start of the text, 1 at its end; None without spans."""
        return min(self.spans)[0] / len(self.text) if self.spans else None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The answer to an example, and its scores.

    Attributes:
      answer: the model's text.
      scores: the task's scores of the answer. If the example has spans, also "kept", the share of their characters
        that is kept, and "facts_kept", the share of spans that count as kept (see `runner.WHOLE`).
      timings: seconds per stage; see `pipeline.Result`.
    """

    example: Example
    answer: str
    scores: Mapping[str, float]
    timings: Mapping[str, float]
