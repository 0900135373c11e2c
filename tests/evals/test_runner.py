"""Running methods over examples: which scores an outcome has, and which texts are read once."""

import types

import pytest

from gemfilter_jax.evals import metrics, runner
from gemfilter_jax.evals.example import Example
from gemfilter_jax.evals.task import Task
from gemfilter_jax.methods.full import Full
from gemfilter_jax.methods.gemfilter.method import GemFilter

EXAMPLE = Example(
    name="keys",
    text="0123456789" * 10,
    question="Where are they?",
    references=("Attic", "47"),
    spans=((0, 20), (50, 60)),
    tokens=100,
)
UNMARKED = Example("keys", "Another text.", "Where?", references=("Attic",), tokens=100)
METHODS = {"full": Full(), "default": GemFilter(filter_layer=1)}


class Contains(Task):
    name = "contains"
    title = "Contains"

    def examples(self, tokenizer, tokens):
        yield EXAMPLE

    def new_tokens(self, example):
        return 24 * len(example.references)

    def score(self, example, answer):
        return {"right": metrics.contains_all(answer, example.references)}


class Model:
    """Answers every question alike, from the same kept spans, and notes what it was asked."""

    def __init__(self, answer: str = "", spans: list[tuple[int, int]] = ()):
        self._result = types.SimpleNamespace(
            text=answer, selection=types.SimpleNamespace(spans=spans), timings={"decode": 1.0}
        )
        self.asked = []

    def generate(self, text, question, *, method, max_new_tokens):
        self.asked.append(("generate", type(method), text, question, max_new_tokens))
        return self._result

    def document(self, text, *, method):
        self.asked.append(("document", type(method), text))

        def ask(question, *, max_new_tokens):
            self.asked.append(("ask", type(method), text, question, max_new_tokens))
            return self._result

        return types.SimpleNamespace(ask=ask)


def only_outcome(model: Model, example: Example = EXAMPLE) -> runner.Outcome:
    ((name, outcome),) = runner.run(model, Contains(), {"full": Full()}, [example])
    assert (name, outcome.example, outcome.timings) == ("full", example, {"decode": 1.0})
    return outcome


@pytest.mark.parametrize(
    ("answer", "right"), [("In the attic, 47.", True), ("In the attic.", False), ("47", False), ("47 ATTICS", True)]
)
def test_right_means_every_reference(answer, right):
    outcome = only_outcome(Model(answer, [(0, 100)]))
    assert outcome.answer == answer
    assert outcome.scores["right"] is right


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
    scores = only_outcome(Model(spans=spans)).scores
    assert scores["kept"] == pytest.approx(kept)
    assert scores["facts_kept"] == facts_kept


def test_without_spans_only_the_task_scores():
    assert only_outcome(Model("attic", [(0, 5)]), UNMARKED).scores == {"right": True}
    assert UNMARKED.depth is None


def test_single_questions_are_answered_in_turn():
    model = Model()
    names = [name for name, _ in runner.run(model, Contains(), METHODS, [EXAMPLE, UNMARKED])]
    assert names == ["full", "default", "full", "default"]
    assert model.asked == [
        ("generate", Full, EXAMPLE.text, EXAMPLE.question, 48),
        ("generate", GemFilter, EXAMPLE.text, EXAMPLE.question, 48),
        ("generate", Full, UNMARKED.text, UNMARKED.question, 24),
        ("generate", GemFilter, UNMARKED.text, UNMARKED.question, 24),
    ]


def test_a_text_with_several_questions_is_one_document():
    model = Model()
    other = Example("lamp", EXAMPLE.text, "And the lamp?", ("Attic",), 100)
    outcomes = list(runner.run(model, Contains(), METHODS, [EXAMPLE, other, UNMARKED]))
    assert [(name, outcome.example) for name, outcome in outcomes] == [
        (name, example) for example in (EXAMPLE, other, UNMARKED) for name in METHODS
    ]
    assert model.asked == [
        ("document", Full, EXAMPLE.text),
        ("document", GemFilter, EXAMPLE.text),
        ("ask", Full, EXAMPLE.text, EXAMPLE.question, 48),
        ("ask", GemFilter, EXAMPLE.text, EXAMPLE.question, 48),
        ("ask", Full, EXAMPLE.text, other.question, 24),
        ("ask", GemFilter, EXAMPLE.text, other.question, 24),
        ("generate", Full, UNMARKED.text, UNMARKED.question, 24),
        ("generate", GemFilter, UNMARKED.text, UNMARKED.question, 24),
    ]
