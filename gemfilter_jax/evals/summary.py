"""Outcomes counted, with how far chance may have moved the counts."""

import dataclasses
import math
from collections.abc import Sequence

from gemfilter_jax.evals.examples import Outcome

_Z_95 = 1.959964  # standard normal quantile of 0.975


@dataclasses.dataclass(frozen=True)
class Summary:
    """Outcomes of one method.

    Attributes:
      asked: how many questions.
      right: how many of them were answered right.
      kept: mean share of the facts' characters that was kept.
      facts_kept: mean share of a question's facts that were kept.
      all_kept: of how many questions every fact was kept.
    """

    asked: int
    right: int
    kept: float
    facts_kept: float
    all_kept: int


def by_length(outcomes: Sequence[Outcome]) -> dict[int, Summary]:
    """A summary for each length of text, in tokens, among one method's outcomes."""
    lengths = dict.fromkeys(outcome.case.tokens for outcome in outcomes)
    return {length: summarise([o for o in outcomes if o.case.tokens == length]) for length in lengths}


def summarise(outcomes: Sequence[Outcome]) -> Summary:
    """Count outcomes, of which there must be at least one."""
    return Summary(
        asked=len(outcomes),
        right=sum(outcome.right for outcome in outcomes),
        kept=sum(outcome.kept for outcome in outcomes) / len(outcomes),
        facts_kept=sum(outcome.facts_kept for outcome in outcomes) / len(outcomes),
        all_kept=sum(outcome.facts_kept == 1 for outcome in outcomes),
    )


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion, without continuity correction (Wilson 1927).

    Raises:
      ValueError: there are no trials, or more successes than trials.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} of {trials} is no proportion")
    share, z2 = successes / trials, _Z_95**2
    middle = share + z2 / (2 * trials)
    half = _Z_95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    scale = 1 + z2 / trials
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
