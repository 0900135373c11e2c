"""Statistics of results: means with intervals, and methods compared on the same examples."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemfilter_jax.evals.result_file import Line

_RESAMPLES = 9_999
_SEED = 0  # of the resamples, so that equal results give equal intervals


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean of a score, and its 95 % interval.

    Attributes:
      count: number of examples that have the score.
      full: number of those with the score 1.
      low, high: Wilson's interval (1927) if all scores are 0 or 1, else a bootstrap interval.
      binary: whether all are 0 or 1.
    """

    count: int
    full: int
    value: float
    low: float
    high: float
    binary: bool

    def __str__(self) -> str:
        low, high = (f"{bound:.2f}".removeprefix("0") for bound in (self.low, self.high))
        return f"{self.value:.2f} ({low}-{high})"


def mean(values: Sequence[float]) -> Mean:
    """The mean of at least one number from 0 to 1."""
    value, binary = sum(values) / len(values), set(values) <= {0, 1}
    full = sum(one == 1 for one in values)
    low, high = wilson(full, len(values)) if binary else _bootstrap(values)
    return Mean(len(values), full, value, low, high, binary)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion, without continuity correction (Wilson 1927).

    Raises:
      ValueError: there are no trials, or more successes than trials.
    """
    from scipy import stats

    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} of {trials} is no proportion")
    interval = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def _bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % percentile interval of the mean."""
    import numpy as np

    drawn = np.random.default_rng(_SEED).choice(np.asarray(values), (_RESAMPLES, len(values)))
    low, high = np.quantile(drawn.mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Summary:
    """Results of a method at a length.

    Attributes:
      method, keep, length: see `Line`.
      group: the part of the task; None for the whole.
      examples: number of examples, errors included. errors: how many of these have no answer.
      tokens: mean length of the texts.
      scores: by name; empty if no example has an answer.
      seconds: median seconds of an answer, all stages but compilation; None without an answer.
    """

    method: str
    keep: int | str
    length: int | None
    group: str | None
    examples: int
    errors: int
    tokens: float
    scores: Mapping[str, Mean]
    seconds: float | None


def summarise(lines: Iterable["Line"], *, by_group: bool = False) -> list[Summary]:
    """A summary for each method, budget and length, and each group if asked for, in the order of the lines."""
    parts: dict[tuple, list[Line]] = {}
    for line in lines:
        group = line.group if by_group else None
        parts.setdefault((line.contestant, line.length, group), []).append(line)
    return [_summary(own, group) for (_, _, group), own in parts.items()]


def _summary(lines: "list[Line]", group: str | None) -> Summary:
    import statistics

    values: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.scores.items():
            values.setdefault(name, []).append(value)
    seconds = [total_seconds(line) for line in lines if line.error is None]
    return Summary(
        method=lines[0].method,
        keep=lines[0].keep,
        length=lines[0].length,
        group=group,
        examples=len(lines),
        errors=sum(line.error is not None for line in lines),
        tokens=statistics.mean(line.tokens for line in lines),
        scores={name: mean(own) for name, own in values.items()},
        seconds=statistics.median(seconds) if seconds else None,
    )


def total_seconds(line: "Line") -> float:
    """Seconds of all stages but compilation."""
    from gemfilter_jax.timing import COMPILE

    return sum(seconds for stage, seconds in line.seconds.items() if stage != COMPILE)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two methods on the examples that both answered.

    Attributes:
      examples: number of these.
      better, worse: how many of these the first method scores higher, and lower, than the second.
      difference: mean score of the first method minus that of the second.
      p: two-sided p-value of the difference: the exact sign test of McNemar if scores are 0 or 1, else a test that
        exchanges the methods' scores at random, example by example.
    """

    examples: int
    better: int
    worse: int
    difference: float
    p: float


def compare(first: Mapping[tuple, float], second: Mapping[tuple, float]) -> Comparison | None:
    """Compare scores by example; None if no example has both.

    Examples about the same text are counted as independent, which makes p smaller than it should be.
    """
    import numpy as np
    from scipy import stats

    both = sorted(first.keys() & second.keys(), key=str)
    if not both:
        return None
    differences = np.array([first[one] - second[one] for one in both])
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    if set(differences.tolist()) <= {-1.0, 0.0, 1.0}:
        p = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
    else:
        signs = np.random.default_rng(_SEED).choice([-1.0, 1.0], (_RESAMPLES, len(both)))
        as_far = np.abs(signs @ differences) >= abs(differences.sum()) * (1 - 1e-12)
        p = float((as_far.sum() + 1) / (_RESAMPLES + 1))
    return Comparison(len(both), better, worse, float(differences.mean()), p)


def scores_by_example(
    lines: Iterable["Line"], contestant: tuple[str, int | str], score: str
) -> dict[tuple[int | None, int], float]:
    """A contestant's score of each example that has it."""
    return {
        line.example: line.scores[score] for line in lines if line.contestant == contestant and score in line.scores
    }
