"""A question of a long text whose answers stand in known places, and what became of asking it."""

import dataclasses

from gemfilter_jax.methods import Method
from gemfilter_jax.pipeline import Pipeline

WHOLE = 0.9
"""A fact counts as kept if at least this share of its characters is; a missing full stop costs no answer."""

_NEW_TOKENS_PER_ANSWER = 24


@dataclasses.dataclass(frozen=True)
class Case:
    """A question of a long text.

    Attributes:
      name: which fact is asked for, for reports.
      text: the haystack with the facts in it.
      question: asks for one fact or for several.
      answers: for each of them, the word that a right answer contains.
      spans: for each of them, where its characters are in `text`: [start, end).
      tokens: about how many tokens `text` has.
    """

    name: str
    text: str
    question: str
    answers: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    tokens: int

    @property
    def depth(self) -> float:
        """Where the first fact is: 0 at the start of the text, 1 at its end."""
        return min(self.spans)[0] / len(self.text)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
      answer: what the model wrote.
      right: whether that contains every answer, in either case.
      kept: the share of the facts' characters that was kept.
      facts_kept: the share of the facts that were kept whole, or nearly (`WHOLE`).
    """

    case: Case
    answer: str
    right: bool
    kept: float
    facts_kept: float


def ask(model: Pipeline, case: Case, method: Method, max_new_tokens: int | None = None) -> Outcome:
    """Ask a case's question.

    Args:
      max_new_tokens: 24 for each answer if None.
    """
    limit = max_new_tokens or _NEW_TOKENS_PER_ANSWER * len(case.answers)
    result = model.generate(case.text, case.question, method=method, max_new_tokens=limit)
    lengths = [end - start for start, end in case.spans]
    covered = [
        sum(max(0, min(end, last) - max(start, first)) for first, last in result.selection.spans)
        for start, end in case.spans
    ]
    whole = [kept >= WHOLE * length for kept, length in zip(covered, lengths, strict=True)]
    return Outcome(
        case=case,
        answer=result.text,
        right=all(answer.lower() in result.text.lower() for answer in case.answers),
        kept=sum(covered) / sum(lengths),
        facts_kept=sum(whole) / len(whole),
    )
