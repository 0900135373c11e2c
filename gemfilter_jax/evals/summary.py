"""Statistics of results: means with intervals, and methods compared on the same examples."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemfilter_jax.evals.result_file import Line

_BLOCKS, _BLOCK = 9, 1_111  # resamples drawn together, which bounds memory
_RESAMPLES = _BLOCKS * _BLOCK
_FEWEST = 5  # values of which a bootstrap interval says something
KEPT = "kept"
"""The score that tells which answers are in what was kept."""

_COMPILE, _READ = "compile", "read"  # stages; see `pipeline.Result`
_SEED = 0  # of the resamples, so that equal results give equal intervals


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean of a score, and its 95 % interval.

    Attributes:
      count: number of examples that have the score.
      interval: Wilson's (1927) if the score is 0 or 1, else a bootstrap interval, and None of too few values for one.
    """

    count: int
    value: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.value:.2f}"
        low, high = (f"{bound:.2f}".removeprefix("0") for bound in self.interval)
        return f"{self.value:.2f} ({low}-{high})"


def mean(values: Sequence[float], *, binary: bool) -> Mean:
    """The mean of at least one number from 0 to 1.

    Args:
      binary: whether the score is always 0 or 1, which these values alone do not tell.
    """
    value, count = sum(values) / len(values), len(values)
    if not binary and count < _FEWEST:
        return Mean(count, value, None)
    low, high = wilson(round(sum(values)), count) if binary else _bootstrap(values)
    return Mean(count, value, (min(low, value), max(high, value)))


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

    rng, held = np.random.default_rng(_SEED), np.asarray(values)
    means = np.concatenate([rng.choice(held, (_BLOCK, len(held))).mean(axis=1) for _ in range(_BLOCKS)])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Tenth:
    """Estimates of recall in a tenth of their range, and what was kept.

    Attributes:
      stated: the mean estimate. measured: the mean share of answers that were kept.
    """

    stated: float
    measured: Mean


def reliability(lines: "Iterable[Line]") -> list[Tenth]:
    """The estimates of recall beside the measured recall, in tenths of the range; empty tenths are left out."""
    tenths: dict[int, list[tuple[float, float]]] = {}
    for line in lines:
        if line.recall_estimate is not None and KEPT in line.scores:
            tenth = min(int(line.recall_estimate * 10), 9)
            tenths.setdefault(tenth, []).append((line.recall_estimate, line.scores[KEPT]))
    made = []
    for _, pairs in sorted(tenths.items()):
        stated, kept = zip(*pairs, strict=True)
        binary = all(value in (0, 1) for value in kept)
        made.append(Tenth(sum(stated) / len(stated), mean(kept, binary=binary)))
    return made


@dataclasses.dataclass(frozen=True)
class Summary:
    """Results of a method at a length.

    Attributes:
      method, keep, length: see `Line`.
      group: the part of the task; None for the whole.
      examples: number of examples, errors included. errors: how many of these have no answer.
      tokens: mean length of the texts.
      scores: by name; empty if no example has an answer.
      seconds: median seconds of an answer, all stages but compilation and the reading of a document that serves
        several; None without an answer.
      reading: median seconds of such a reading, whichever budget it was for; None if there was none.
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
    reading: float | None


def summarise(lines: Iterable["Line"], *, by_group: bool = False) -> list[Summary]:
    """A summary for each method, budget and length, and each group if asked for, in the order of the lines."""
    parts: dict[tuple, list[Line]] = {}
    readings: dict[tuple, list[float]] = {}
    partial: set[str] = set()
    for line in lines:
        group = line.group if by_group else None
        parts.setdefault((line.contestant, line.length, group), []).append(line)
        if _READ in line.seconds:
            readings.setdefault((line.method, line.length, group), []).append(line.seconds[_READ])
        partial |= {name for name, value in line.scores.items() if value not in (0, 1)}
    return [
        _summary(own, group, partial, readings.get((contestant[0], length, group), []))
        for (contestant, length, group), own in parts.items()
    ]


def _summary(lines: "list[Line]", group: str | None, partial: set[str], readings: list[float]) -> Summary:
    """The summary of lines of one method, budget and length.

    Args:
      partial: scores that are not always 0 or 1. readings: seconds of readings that serve these lines or others.
    """
    import statistics

    values: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.scores.items():
            values.setdefault(name, []).append(value)
    seconds = [_seconds(line) for line in lines if line.error is None]
    return Summary(
        method=lines[0].method,
        keep=lines[0].keep,
        length=lines[0].length,
        group=group,
        examples=len(lines),
        errors=sum(line.error is not None for line in lines),
        tokens=statistics.mean(line.tokens for line in lines),
        scores={name: mean(own, binary=name not in partial) for name, own in values.items()},
        seconds=statistics.median(seconds) if seconds else None,
        reading=statistics.median(readings) if readings else None,
    )


def _seconds(line: "Line") -> float:
    return sum(seconds for stage, seconds in line.seconds.items() if stage not in (_COMPILE, _READ))


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
        rng, least = np.random.default_rng(_SEED), abs(differences.sum()) * (1 - 1e-12)
        as_far = sum(abs(rng.choice([-1.0, 1.0], len(both)) @ differences) >= least for _ in range(_RESAMPLES))
        p = float((as_far + 1) / (_RESAMPLES + 1))
    return Comparison(len(both), better, worse, float(differences.mean()), p)


def scores_by_example(
    lines: Iterable["Line"], contestant: tuple[str, int | str], score: str
) -> dict[tuple[int | None, int], float]:
    """A contestant's score of each example that has it."""
    return {
        line.example: line.scores[score] for line in lines if line.contestant == contestant and score in line.scores
    }
