"""Asking and counting: what is right, what is kept, and how sure a count is."""

import types

import pytest

from gemfilter_jax.evals import examples, summary
from gemfilter_jax.evals.examples import Case, Outcome

CASE = Case(
    name="keys",
    text="0123456789" * 10,
    question="Where are they?",
    answers=("Attic", "47"),
    spans=((0, 20), (50, 60)),
    tokens=100,
)


class Model:
    """Answers everything alike, from the same kept spans."""

    def __init__(self, text: str, spans: list[tuple[int, int]]):
        self.result = types.SimpleNamespace(text=text, selection=types.SimpleNamespace(spans=spans), timings={})

    def generate(self, text, question, *, method, max_new_tokens):
        assert (text, question, max_new_tokens) == (CASE.text, CASE.question, 48)
        return self.result


@pytest.mark.parametrize(
    ("answer", "right"), [("In the attic, 47.", True), ("In the attic.", False), ("47", False), ("47 ATTICS", True)]
)
def test_right_means_every_answer(answer, right):
    assert examples.Asking(Model(answer, [(0, 100)]), method=None)(CASE).right is right


@pytest.mark.parametrize(
    ("spans", "kept", "facts_kept"),
    [
        ([(0, 100)], 1.0, 1.0),
        ([], 0.0, 0.0),
        ([(0, 18), (51, 100)], 27 / 30, 1.0),
        ([(0, 17), (50, 60)], 27 / 30, 0.5),
        ([(0, 5), (10, 25)], 15 / 30, 0.0),
        ([(20, 50)], 0.0, 0.0),
    ],
)
def test_kept(spans, kept, facts_kept):
    outcome = examples.Asking(Model("", spans), method=None)(CASE)
    assert outcome.kept == pytest.approx(kept)
    assert outcome.facts_kept == facts_kept


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


def test_summary_by_length():
    longer = Case(**{**vars(CASE), "tokens": 200})
    outcomes = [
        Outcome(CASE, "", right=True, kept=1.0, facts_kept=1.0, timings={}),
        Outcome(longer, "", right=False, kept=0.5, facts_kept=0.5, timings={}),
        Outcome(CASE, "", right=False, kept=0.5, facts_kept=0.0, timings={}),
    ]
    counted = summary.by_length(outcomes)
    assert counted[100] == summary.Summary(asked=2, right=1, kept=0.75, facts_kept=0.5, all_kept=1)
    assert counted[200] == summary.Summary(asked=1, right=0, kept=0.5, facts_kept=0.5, all_kept=0)
