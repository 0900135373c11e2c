"""Statistics of outcomes: counts, means, and how sure a count is."""

import pytest

from gemfilter_jax.evals import summary
from gemfilter_jax.evals.example import Example, Outcome


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


def outcome(tokens: int, **scores: float) -> Outcome:
    example = Example("keys", "0123456789" * 10, "Where are they?", ("Attic",), tokens)
    return Outcome(example, answer="", scores=scores, timings={})


def test_summary_by_length():
    counted = summary.by_length(
        [
            outcome(100, right=True, kept=1.0, facts_kept=1.0),
            outcome(200, right=False, kept=0.5, facts_kept=0.5),
            outcome(100, right=False, kept=0.5, facts_kept=0.0),
        ]
    )
    assert counted[100] == summary.Summary(
        asked=2,
        means={"right": 0.5, "kept": 0.75, "facts_kept": 0.5},
        full={"right": 1, "kept": 1, "facts_kept": 1},
    )
    assert counted[200] == summary.Summary(
        asked=1,
        means={"right": 0.0, "kept": 0.5, "facts_kept": 0.5},
        full={"right": 0, "kept": 0, "facts_kept": 0},
    )


@pytest.mark.parametrize(
    ("column", "heading", "cell"),
    [
        (summary.ASKED, "asked", "263"),
        (summary.count("right"), "right", "81"),
        (summary.proportion("right"), "right (95 %)", "81 (.26-.37)"),
        (summary.proportion("right", "all kept"), "all kept (95 %)", "81 (.26-.37)"),
        (summary.mean("facts_kept"), "facts kept", "0.63"),
        (summary.mean("facts_kept", "needle kept"), "needle kept", "0.63"),
    ],
)
def test_columns(column, heading, cell):
    counted = summary.Summary(asked=263, means={"facts_kept": 0.634}, full={"right": 81})
    assert (column.heading, column.cell(counted)) == (heading, cell)


def test_columns_that_suit_scores():
    headings = [column.heading for column in summary.columns_of({"right": True, "word_f1": 0.25})]
    assert headings == ["asked", "right (95 %)", "word f1"]
