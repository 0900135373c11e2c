"""A question of a long text whose answers stand in known places, and what became of asking it."""

import dataclasses

from gemfilter_jax.methods.gemfilter.method import GemFilter, Method
from gemfilter_jax.pipeline import Document, Pipeline, Result

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
      timings: seconds per stage; see `Result`.
    """

    case: Case
    answer: str
    right: bool
    kept: float
    facts_kept: float
    timings: dict[str, float]


class Asking:
    """Asks a model questions by one method."""

    def __init__(self, model: Pipeline, method: Method):
        self._model, self._method = model, method
        self._document: tuple[str, Document] | None = None

    def __call__(self, case: Case, *, shared: bool = False) -> Outcome:
        """Ask a case's question, for 24 tokens for each fact.

        Args:
          shared: read the text once for this case and the next ones of the same text.
        """
        limit = _NEW_TOKENS_PER_ANSWER * len(case.answers)
        if not shared or not isinstance(self._method, GemFilter):
            result = self._model.generate(case.text, case.question, method=self._method, max_new_tokens=limit)
            return _outcome(case, result)
        if self._document is None or self._document[0] != case.text:
            self._document = None
            self._document = (case.text, self._model.document(case.text, method=self._method))
        return _outcome(case, self._document[1].ask(case.question, max_new_tokens=limit))


def _outcome(case: Case, result: Result) -> Outcome:
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
        timings=result.timings,
    )
