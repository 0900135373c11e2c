"""Statistics of results: means, how sure they are, and methods compared on the same examples."""

import dataclasses
import itertools

import numpy as np
import pytest
from scipy import stats

from gemfilter_jax.evals import summary
from gemfilter_jax.evals.result_file import Line


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # the last four from Newcombe 1998, table I, method 3
        (10, 12, 0.5520, 0.9530),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(successes, trials, low, high):
    assert summary.wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)
    assert summary.wilson(trials - successes, trials) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_of_no_proportion(successes, trials):
    with pytest.raises(ValueError, match="is no proportion"):
        summary.wilson(successes, trials)


def test_a_mean_of_rights_and_wrongs_has_wilsons_interval():
    made = summary.mean([1.0] * 81 + [0.0] * 182, binary=True)
    assert made.count == 263
    assert (made.value, *made.interval) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=5e-5)
    assert str(made) == "0.31 (.26-.37)"


def test_estimates_of_recall_stand_beside_what_was_kept():
    """In tenths of their range; lines without an estimate, or of which nothing is known to be kept, do not count."""

    def line(estimate: float | None, **scores: float) -> Line:
        known = dict.fromkeys(("length", "depth", "prompt_tokens"), None)
        told = dict.fromkeys(("method", "name", "digest", "group", "question", "answer"), "")
        return Line(
            **known,
            **told,
            number=0,
            keep=1,
            tokens=1,
            expected=(),
            scores=scores,
            seconds={},
            recall_estimate=estimate,
        )

    lines = [line(0.91, kept=1.0), line(1.0, kept=0.0), line(0.22, kept=0.5), line(None, kept=1.0), line(0.5)]
    low, high = summary.reliability(lines)
    assert (low.stated, low.measured.value, low.measured.count) == (0.22, 0.5, 1)
    assert (high.stated, high.measured.value, high.measured.count) == (pytest.approx(0.955), 0.5, 2)


def test_a_mean_of_other_scores_has_a_bootstrap_interval():
    """It is near the normal one, within what 9,999 resamples leave open: some thousandths."""
    values = np.linspace(0.2, 0.8, 200)
    made = summary.mean(values.tolist(), binary=False)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert (made.value, *made.interval) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=0.003)
    assert made == summary.mean(values.tolist(), binary=False)
    alike = summary.mean([11 / 12] * 7, binary=False)
    low, high = alike.interval
    assert low <= alike.value <= high
    assert high - low < 1e-12


def test_few_values_of_a_score_between_0_and_1_have_no_interval():
    """Whichever these are: that a method was always right must not give it another interval than the others'."""
    for values in ([0.5], [1.0] * 4):
        assert summary.mean(values, binary=False).interval is None
    assert str(summary.mean([0.5, 1.0], binary=False)) == "0.75"
    low, high = summary.mean([1.0, 1.0, 1.0, 1.0, 0.5], binary=False).interval
    assert low < 0.9 < high
    right = [line(number, scores={"right": 1.0}) for number in range(3)]
    part = [line(number, "bm25", scores={"right": 0.5}) for number in range(3)]
    assert summary.summarise(right)[0].scores["right"].interval is not None
    assert summary.summarise(right + part)[0].scores["right"].interval is None


def line(number=0, method="default", keep=512, length=100, **changes) -> Line:
    made = Line(
        length=length, number=number, method=method, keep=keep, name="", digest="", group="", depth=None, tokens=90,
        question="?", expected=(), answer="", scores={}, prompt_tokens=1, seconds={},
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


LINES = [
    line(0, scores={"right": 1.0, "kept": 0.5}, seconds={"filter": 1.0, "compile": 9.0}, group="a"),
    line(1, scores={"right": 0.0}, seconds={"filter": 2.0, "decode": 3.0, "read": 7.0}, group="b", tokens=94),
    line(2, error="too long", group="a", tokens=92),
    line(0, "bm25", 256, scores={"right": 1.0}, seconds={"decode": 0.5}, group="a"),
    line(0, length=200, scores={"right": 1.0}, group="a"),
]


def test_summaries_are_by_method_budget_and_length():
    first, second, third = summary.summarise(LINES)
    assert (first.method, first.keep, first.length, first.group) == ("default", 512, 100, None)
    assert (first.examples, first.errors, first.tokens, first.seconds) == (3, 1, 92, 3.0)
    assert (first.reading, second.reading) == (7.0, None)
    assert {name: (one.value, one.count) for name, one in first.scores.items()} == {"right": (0.5, 2), "kept": (0.5, 1)}
    assert (second.method, second.keep, second.seconds) == ("bm25", 256, 0.5)
    assert (third.length, third.examples) == (200, 1)
    grouped = summary.summarise(LINES, by_group=True)
    assert [(one.group, one.examples) for one in grouped[:2]] == [("a", 2), ("b", 1)]


def test_a_reading_counts_for_every_budget_that_it_serves():
    """Its median, as that of seconds; lengths are means."""
    reading = [line(number, keep=256, seconds={"read": float(4**number)}, tokens=90 + 9**number) for number in range(3)]
    others = [line(number, seconds={"decode": 1.0}) for number in range(3)]
    apart = line(0, "paper", seconds={"filter": 1.0})
    made = summary.summarise([*reading, *others, apart])
    assert [(one.keep, one.reading) for one in made] == [(256, 4.0), (512, 4.0), (512, None)]
    assert made[0].tokens == 90 + (1 + 9 + 81) / 3


def test_nothing_but_errors_has_no_scores():
    (made,) = summary.summarise([line(error="too long")])
    assert (made.examples, made.errors, made.scores, made.seconds) == (1, 1, {}, None)


def scores(values) -> dict:
    return {(100, number): value for number, value in enumerate(values)}


@pytest.mark.parametrize(("better", "worse"), [(9, 1), (3, 3), (0, 6), (0, 0), (1, 0)])
def test_rights_are_compared_by_the_exact_sign_test(better, worse):
    first = [1.0] * better + [0.0] * worse + [1.0, 0.0]
    second = [0.0] * better + [1.0] * worse + [1.0, 0.0]
    made = summary.compare(scores(first), scores(second))
    count = better + worse
    tails = [stats.binom.pmf(k, count, 0.5) for k in range(count + 1)]
    expected = sum(one for one in tails if one <= tails[better] * (1 + 1e-9))
    assert (made.examples, made.better, made.worse) == (count + 2, better, worse)
    assert made.difference == pytest.approx((better - worse) / (count + 2))
    assert made.p == pytest.approx(expected)


def test_other_scores_are_compared_by_exchanging_them():
    """Against all 2^12 exchanges; 9,999 random ones differ by at most four standard errors."""
    rng = np.random.default_rng(3)
    first, second = rng.random(12), rng.random(12) - 0.25
    made = summary.compare(scores(first), scores(second))
    differences = first - second
    exchanged = np.array(list(itertools.product([-1, 1], repeat=12))) @ differences
    exact = (np.abs(exchanged) >= abs(differences.sum()) - 1e-9).mean()
    assert 0.02 < exact < 0.5
    far = scores([1.0, 0.75] * 10)
    assert summary.compare(far, scores([0.0] * 20)).p == 1 / 10_000  # never 0: the given signs are one exchange
    assert made.p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 9_999) + 1e-4)
    assert (made.better, made.worse) == ((differences > 0).sum(), (differences < 0).sum())


def test_only_examples_with_both_scores_are_compared():
    first, second = scores([1.0, 1.0, 0.0]), {(100, 1): 0.0, (200, 1): 1.0}
    assert summary.compare(first, second).examples == 1
    assert summary.compare(first, {}) is None
    assert summary.scores_by_example(LINES, ("default", 512), "kept") == {(100, 0): 0.5}
