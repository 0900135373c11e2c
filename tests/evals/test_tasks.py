"""Conformance of every task in the registry; a new one enters by its line there."""

import copy
import dataclasses
import importlib.util
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import ClassVar

import pytest

from gemfilter_jax.cli import evaluate
from gemfilter_jax.cli import options as cli_options
from gemfilter_jax.errors import UserError
from gemfilter_jax.evals import tasks
from gemfilter_jax.evals.example import Example
from gemfilter_jax.evals.task import Task
from gemfilter_jax.methods.full import Full
from gemfilter_jax.results import KeptText, Result
from gemfilter_jax.settings import option

TOKENS = 700
SAMPLE = 8
FILES = pathlib.Path(__file__).parent / "task_files"
SMALL = {
    "longbench": {"data": str(FILES / "longbench")},
    "real_questions": {"questions_file": str(FILES / "real_questions.jsonl"), "join": 3},
}
"""The arguments of a small instance of each task that needs some."""

every_task = pytest.mark.parametrize("name", tasks.TASKS)


def small(name: str, **settings) -> Task:
    return tasks.TASKS[name](**SMALL.get(name, {}), **settings)


def sample(task: Task, tokenizer, tokens: int = TOKENS) -> list[Example]:
    return list(itertools.islice(task.examples(tokenizer, tokens if task.sized else 0), SAMPLE))


@every_task
def test_examples_are_a_function_of_the_task(name, tokenizer):
    made = sample(small(name), tokenizer)
    assert made
    assert made == sample(small(name), tokenizer)
    if "seed" in small(name).settings:
        other = sample(small(name, seed=1), tokenizer)
        assert {one.text for one in other}.isdisjoint(one.text for one in made)


def test_examples_do_not_depend_on_the_process(tokenizer):
    """Digests are those of a process that hashes strings otherwise."""
    code = """
import pathlib, sys
sys.path[:0] = [sys.argv[1], str(pathlib.Path(sys.argv[1]) / "evals")]
import test_tasks
from gemfilter_jax.checkpoints import open_checkpoint
print(test_tasks.digests(open_checkpoint("smollm2").tokenizer()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(pathlib.Path(__file__).parents[1])],
        env=os.environ | {"PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.split("\n")[-2] == str(digests(tokenizer))


def digests(tokenizer) -> list[str]:
    return [one.digest for name in tasks.TASKS for one in sample(small(name), tokenizer, 400)]


@every_task
def test_spans_hold_the_references(name, tokenizer):
    for example in sample(small(name), tokenizer):
        assert example.references
        for start, end in example.spans:
            assert 0 <= start < end <= len(example.text)
        if len(example.spans) == len(example.references):
            for reference, (start, end) in zip(example.references, example.spans, strict=True):
                assert reference in example.text[start:end]


@every_task
@pytest.mark.parametrize("tokens", [TOKENS, 4_000])
def test_texts_are_as_long_as_asked(name, tokens, tokenizer):
    task = small(name)
    for example in sample(task, tokenizer, tokens):
        if task.sized:
            assert example.tokens == tokens
        assert abs(len(tokenizer(example.text)["input_ids"]) - example.tokens) <= 0.03 * example.tokens


@every_task
def test_scores(name, tokenizer):
    task = small(name)
    for example in sample(task, tokenizer):
        best, worst = task.score(example, ", ".join(example.references)), task.score(example, "")
        assert best
        assert set(best.values()) == {1}
        assert set(worst.values()) == {0}
        assert list(best) == list(worst)
        assert isinstance(task.new_tokens(example), int)
        assert task.new_tokens(example) >= max(len(tokenizer(one)["input_ids"]) for one in example.references)


@every_task
def test_names_and_help(name):
    make = tasks.TASKS[name]
    assert make.name == name
    assert make.title
    assert make.__doc__.split("\n\n")[0] != Task.__doc__.split("\n\n")[0]


@every_task
def test_options_make_flags(name, monkeypatch):
    """Each is a flag with its help; given with its default, it makes the same task; out of bounds, it is refused."""
    make = tasks.TASKS[name]
    shown = " ".join(evaluate.FLAGS.get_help().split())
    needed = SMALL.get(name, {})
    given = [f"--{option}={value}" for option, value in needed.items()]
    for one in make.options():
        assert f"--{one.name}: " in shown or f"--[no]{one.name}: " in shown
        assert " ".join(f"{name}: {one.help}".split()) in " ".join(evaluate.FLAGS[one.name].help.split())
        if one.default is not None and one.name not in needed:
            one.check(one.default, one.name)
            given.append(f"--{one.name}={one.default}")
    monkeypatch.setattr(evaluate, "FLAGS", copy.deepcopy(evaluate.FLAGS))
    evaluate.FLAGS(["evaluate", f"--task={name}", *given])
    assert evaluate._chosen_task() == small(name)
    assert set(small(name).settings) == {one.name for one in make.options()}


def test_options_of_one_name_are_of_one_kind():
    kinds: dict[str, type] = {}
    for one in itertools.chain.from_iterable(task.options() for task in tasks.TASKS.values()):
        assert kinds.setdefault(one.name, one.kind) is one.kind


def test_flags_are_made_without_jax():
    code = "import sys; import gemfilter_jax.cli.evaluate; print({'jax', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "set()"


@dataclasses.dataclass(frozen=True)
class Repeated(Task):
    """A word among others that is named in the question.

    The second paragraph is not in the help.
    """

    name: ClassVar[str] = "repeated"
    title: ClassVar[str] = "Repeated words"
    word: str = option("zebra", "The word.")
    weight: float = option(0.5, "The score of an answer without the word.", at_least=0, at_most=1)
    seed: int = option(7, "Not of hidden_facts.", at_least=1)

    def examples(self, tokenizer, tokens):
        yield Example("word", "apple " * (tokens // 2), f"Say {self.word}.", (self.word,), tokens)

    def new_tokens(self, example):
        return 4

    def score(self, example, answer):
        said = self.word in answer
        return {"said": float(said), "partial_credit": 1.0 if said else self.weight}


@pytest.fixture
def command_with_third_task(monkeypatch):
    """The command line as it is when the registry has one line more."""
    monkeypatch.setitem(tasks.TASKS, Repeated.name, Repeated)
    spec = importlib.util.spec_from_file_location("evaluate_with_third_task", evaluate.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclasses.dataclass(frozen=True)
class Model:
    """Answers "kiwi" with full attention, else "apple"."""

    checkpoint: object
    preset: object
    message_format: str = "{text}{question}"
    chat_template: bool = True

    def generate(self, text, question, *, method, max_new_tokens):
        assert (text[:12], question, max_new_tokens) == ("apple apple ", "Say kiwi.", 4)
        answer = "kiwi" if isinstance(method, Full) else "apple"
        return Result(answer, (), "stop", KeptText(text, 130, (0,), ()), {"decode": 0.125})


def test_a_third_task_is_one_class_and_one_registry_line(
    command_with_third_task, smollm2, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(cli_options, "load_pipeline", lambda _: Model(smollm2.checkpoint, smollm2.preset))
    output = tmp_path / "result.jsonl"
    command_with_third_task.FLAGS(
        [
            *("evaluate", "--task=repeated", "--word=kiwi", "--weight=0.25", "--lengths=120", "--keep=64"),
            *("--method=full,default", f"--output={output}"),
        ]
    )
    command_with_third_task.main([])
    heading, *lines = map(json.loads, output.read_text().splitlines())
    assert heading["task"] == "repeated"
    assert heading["options"] == {"word": "kiwi", "weight": 0.25, "seed": 7}
    assert [one["method"] for one in heading["methods"]] == ["full", "default"]
    assert [(one["method"], one["keep"], one["answer"], one["scores"]) for one in lines] == [
        ("full", "all", "kiwi", {"said": 1.0, "partial_credit": 1.0}),
        ("default", 64, "apple", {"said": 0.0, "partial_credit": 0.25}),
    ]
    shown = capsys.readouterr().out
    assert "Repeated words" in shown
    assert re.search(r"│ +0\.25 │", shown)


def test_the_example_in_the_documentation(tokenizer):
    """Its code block, as it stands."""
    text = (pathlib.Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    space: dict = {"__name__": "example"}
    exec(code, space)
    make = space["Passwords"]
    (example,) = make(seed=3).examples(tokenizer, 500)
    ((start, end),) = example.spans
    assert example.text[start:end] == f"The password is {example.references[0]}."
    assert 0 <= len(tokenizer(example.text)["input_ids"]) - 500 <= 20
    assert make().score(example, f"It is {example.references[0]}") == {"right": 1.0}
    assert make().score(example, "It is 3") == {"right": 0.0}
    assert make(seed=4) != make() == make(seed=0)
    assert make().settings == {"seed": 0}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--task=repeated", "--count=3"], "--count means nothing to --task=repeated"),
        (["--task=needles", "--seed=3"], "give --task=hidden_facts or "),
        (["--task=repeated", "--weight=1.5"], "--weight=1.5: expected a number in [0, 1]"),
        (["--task=repeated", "--seed=0"], "--seed=0: expected a number of at least 1"),
    ],
)
def test_options_of_a_third_task_are_checked(command_with_third_task, given, said):
    module = command_with_third_task
    module.FLAGS(["evaluate", *given])
    with pytest.raises(UserError, match=re.escape(said)):
        module._chosen_task()


def test_options_of_one_name_share_a_flag(command_with_third_task):
    module = command_with_third_task
    assert "Default: 0." in module.FLAGS["seed"].help
    assert "repeated: Not of hidden_facts. A number of at least 1. Default: 7." in module.FLAGS["seed"].help
    module.FLAGS(["evaluate", "--task=hidden_facts", "--seed=0"])
    assert module._chosen_task().settings["seed"] == 0
