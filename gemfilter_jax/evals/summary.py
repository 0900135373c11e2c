"""Statistics of outcomes: counts, means, intervals, and the table cells that show them."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from gemfilter_jax.evals.example import Outcome

_Z_95 = 1.959964  # standard normal quantile of 0.975


@dataclasses.dataclass(frozen=True)
class Summary:
    """Statistics of one method's outcomes.

    Attributes:
      asked: number of questions.
      means: mean of each score.
      full: number of questions with a score of 1, for each score.
    """

    asked: int
    means: Mapping[str, float]
    full: Mapping[str, int]


def by_length(outcomes: Sequence[Outcome]) -> dict[int, Summary]:
    """A summary of one method's outcomes for each text length in tokens."""
    lengths = dict.fromkeys(outcome.example.tokens for outcome in outcomes)
    return {length: summarise([o for o in outcomes if o.example.tokens == length]) for length in lengths}


def summarise(outcomes: Sequence[Outcome]) -> Summary:
    """The summary of at least one outcome."""
    scores = {name: [outcome.scores[name] for outcome in outcomes] for name in outcomes[0].scores}
    return Summary(
        asked=len(outcomes),
        means={name: sum(values) / len(values) for name, values in scores.items()},
        full={name: sum(value == 1 for value in values) for name, values in scores.items()},
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


@dataclasses.dataclass(frozen=True)
class Column:
    """A table column: its heading, and the function that makes a summary's cell."""

    heading: str
    cell: Callable[[Summary], str]


ASKED = Column("asked", lambda summary: str(summary.asked))
"""The number of questions."""


def count(score: str) -> Column:
    """The number of questions with a score of 1."""
    return Column(_words(score), lambda summary: str(summary.full[score]))


def proportion(score: str, heading: str | None = None) -> Column:
    """The number of questions with a score of 1, with the 95 % interval of their share: "41 (.56-.79)"."""

    def cell(summary: Summary) -> str:
        bounds = (f"{bound:.2f}".removeprefix("0") for bound in wilson(summary.full[score], summary.asked))
        return f"{summary.full[score]} ({'-'.join(bounds)})"

    return Column(f"{heading or _words(score)} (95 %)", cell)


def mean(score: str, heading: str | None = None) -> Column:
    """The mean of a score."""
    return Column(heading or _words(score), lambda summary: f"{summary.means[score]:.2f}")


def columns_of(scores: Mapping[str, float]) -> tuple[Column, ...]:
    """The columns for an outcome's scores: a proportion for each bool, a mean for each number."""
    own = (proportion(name) if isinstance(value, bool) else mean(name) for name, value in scores.items())
    return (ASKED, *own)


def _words(score: str) -> str:
    return score.replace("_", " ")
