"""Running contestants over examples: in what order, which texts are read once, and what becomes of each trial."""

import dataclasses
import itertools
from typing import ClassVar

import jax
import pytest

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals import metrics, runner
from gemfilter_jax.evals.example import Example, Outcome
from gemfilter_jax.evals.runner import Contestant
from gemfilter_jax.evals.task import Task
from gemfilter_jax.methods.full import Full
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.methods.streaming_llm import StreamingLLM
from gemfilter_jax.results import KeptText, Result

TEXT, OTHER = "0123456789" * 10, "Another text."
KEYS = Example("keys", TEXT, "Where are they?", ("Attic", "47"), tokens=100, spans=((0, 20), (50, 60)))
LAMP = Example("lamp", TEXT, "And the lamp?", ("Attic",), tokens=100)
ALONE = Example("alone", OTHER, "Where?", ("Attic",), tokens=4)
SMALL, LARGE = (Contestant("default", keep, GemFilter(1, keep=keep)) for keep in (256, 512))
ALL = Contestant("full", "all", Full())


@dataclasses.dataclass(frozen=True)
class Contains(Task):
    name: ClassVar[str] = "contains"
    title: ClassVar[str] = "Contains"
    made: tuple[Example, ...] = (KEYS, LAMP, ALONE)

    def examples(self, tokenizer, tokens):
        return iter(self.made)

    def new_tokens(self, example):
        return 24 * len(example.references)

    def score(self, example, answer):
        return {"right": float(metrics.contains_all(answer, example.references))}


class Unsized(Contains):
    sized: ClassVar[bool] = False

    def examples(self, tokenizer, tokens):
        assert tokens == 0
        return iter(self.made)


@dataclasses.dataclass(frozen=True)
class Model:
    """Answers every question alike, from the same kept spans, and notes what it was asked."""

    answer: str = ""
    spans: tuple[tuple[int, int], ...] = ()
    message_format: str = "own"
    chat_template: bool = True
    asked: list = dataclasses.field(default_factory=list, compare=False)
    refused: type | None = None
    error: Exception | None = None

    def _result(self, text, method, *noted) -> Result:
        self.asked.append((*noted, getattr(method, "keep", None)))
        if type(method) is self.refused:
            raise self.error or UserError("too long")
        kept = KeptText(text, 7, (0,), self.spans)
        return Result(self.answer, (), "stop", kept, {"decode": 1.0})

    def generate(self, text, question, *, method, max_new_tokens):
        return self._result(text, method, "generate", question, max_new_tokens)

    def select(self, text, question, *, method):
        result = self._result(text, method, "select", question)
        return result.selection, result.timings

    def document(self, text, *, method):
        self.asked.append(("document", text, getattr(method, "keep", None)))
        return Opened(self, text)


@dataclasses.dataclass
class Opened:
    model: Model
    text: str

    def ask(self, question, *, method, max_new_tokens):
        return self.model._result(self.text, method, "ask", question, max_new_tokens)

    def select(self, question, *, method):
        result = self.model._result(self.text, method, "look", question)
        return result.selection, result.timings


def run(model: Model, task: Task, *contestants: Contestant, answer: bool = True) -> list[Outcome]:
    asked = runner.trials(task, None, [100], contestants)
    made = list(runner.run(model, task, asked, answer=answer))
    assert [trial for trial, _ in made] == asked
    return [outcome for _, outcome in made]


def of_keys(model: Model, contestant: Contestant = ALL) -> Outcome:
    (outcome,) = run(model, Contains((KEYS,)), contestant)
    return outcome


@pytest.mark.parametrize(
    ("answer", "right"), [("In the attic, 47.", 1.0), ("In the attic.", 0.0), ("47", 0.0), ("47 ATTICS", 1.0)]
)
def test_answers_are_scored(answer, right):
    outcome = of_keys(Model(answer, ((0, 100),)))
    assert outcome == Outcome(answer, {"right": right, "kept": 1.0}, prompt_tokens=7, timings={"decode": 1.0})


@pytest.mark.parametrize(
    ("spans", "kept"),
    [
        (((0, 100),), 1.0),
        ((), 0.0),
        (((0, 18), (51, 100)), 1.0),
        (((0, 17), (50, 60)), 0.5),
        (((0, 5), (10, 25)), 0.0),
        (((20, 50),), 0.0),
    ],
)
def test_a_span_is_kept_if_nine_tenths_of_it_are(spans, kept):
    assert of_keys(Model(spans=spans)).scores["kept"] == kept


def test_what_is_kept_is_scored_where_there_are_spans_and_text():
    assert run(Model("attic"), Contains((ALONE,)), ALL)[0].scores == {"right": 1.0}
    assert of_keys(Model(), Contestant("streaming_llm", 100, StreamingLLM(100))).scores == {"right": 0.0}


def test_trials_go_by_text_then_contestant_then_question():
    made = runner.trials(Contains(), None, [100, 200], [ALL, SMALL])
    order = [(KEYS, ALL), (LAMP, ALL), (KEYS, SMALL), (LAMP, SMALL), (ALONE, ALL), (ALONE, SMALL)]
    assert [(trial.example, trial.contestant) for trial in made] == 2 * order
    assert [trial.length for trial in made] == [100] * 6 + [200] * 6
    assert [trial.number for trial in made] == 2 * [0, 1, 0, 1, 2, 2]


def test_texts_with_lengths_of_their_own_are_made_once():
    made = runner.trials(Unsized(), None, [100, 200], [ALL])
    assert [trial.length for trial in made] == [None] * 3


def test_shards_share_the_texts_out():
    whole = runner.trials(Contains(), None, [100, 200, 300], [ALL, SMALL])
    shards = [runner.trials(Contains(), None, [100, 200, 300], [ALL, SMALL], shard=(index, 4)) for index in range(4)]
    assert [len(shard) for shard in shards] == [4 + 4, 2 + 2, 4, 2]
    with pytest.raises(UserError, match="shard 7/7 is empty: the run has 6 texts"):
        runner.trials(Contains(), None, [100, 200, 300], [ALL], shard=(6, 7))
    assert sorted(map(str, whole)) == sorted(map(str, itertools.chain(*shards)))


def test_a_text_is_opened_once_for_all_questions_and_budgets():
    model = Model()
    run(model, Contains(), ALL, SMALL, LARGE)
    assert model.asked == [
        ("document", TEXT, None),
        ("ask", KEYS.question, 48, None),
        ("ask", LAMP.question, 24, None),
        ("document", TEXT, 256),
        ("ask", KEYS.question, 48, 256),
        ("ask", LAMP.question, 24, 256),
        ("ask", KEYS.question, 48, 512),
        ("ask", LAMP.question, 24, 512),
        ("generate", ALONE.question, 24, None),
        ("document", OTHER, 256),
        ("ask", ALONE.question, 24, 256),
        ("ask", ALONE.question, 24, 512),
    ]


def test_without_answers_only_what_is_kept_is_asked_for():
    model = Model("attic", ((0, 60),))
    outcomes = run(model, Contains(), SMALL, answer=False)
    assert [outcome.scores for outcome in outcomes] == [{"kept": 1.0}, {}, {}]
    assert {outcome.answer for outcome in outcomes} == {""}
    assert [noted[0] for noted in model.asked] == ["document", "look", "look", "select"]


def test_a_refusal_is_an_outcome():
    outcomes = run(Model("attic, 47", refused=Full), Contains(), ALL, SMALL)
    assert [outcome.error for outcome in outcomes] == ["too long"] * 2 + [None] * 2 + ["too long", None]
    assert {outcome.scores.get("right") for outcome in outcomes} == {None, 1.0}


def test_an_example_brings_its_message_format():
    """Trials with other formats share no document."""
    seen = []

    class Telling(Model):
        def generate(self, text, question, *, method, max_new_tokens):
            seen.append((self.message_format, self.chat_template))
            return super().generate(text, question, method=method, max_new_tokens=max_new_tokens)

    formatted = dataclasses.replace(LAMP, message_format="{text}{question}", plain=True)
    model = Telling()
    run(model, Contains((KEYS, formatted)), ALL)
    assert seen == [("own", True), ("{text}{question}", False)]
    assert [noted[0] for noted in model.asked] == ["generate", "generate"]
    plain = dataclasses.replace(LAMP, plain=True)
    model = Model()
    run(model, Contains((KEYS, plain)), ALL)
    assert [noted[0] for noted in model.asked] == ["generate", "generate"]


def test_too_little_memory_is_an_outcome_and_other_failures_of_the_device_are_not():
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory allocating 1 byte")
    (outcome,) = run(Model(refused=Full, error=full), Contains((ALONE,)), ALL)
    assert outcome == Outcome(error="the device's memory is too small")
    lost = jax.errors.JaxRuntimeError("INTERNAL: device lost")
    with pytest.raises(jax.errors.JaxRuntimeError, match="device lost"):
        run(Model(refused=Full, error=lost), Contains((ALONE,)), ALL)
