"""LongBench: question answering, summaries, few-shot tasks, counting, retrieval and code (Bai et al., 2308.14508).

Prompts, lengths of answers and metrics by dataset are in longbench.json. They are those of
https://github.com/THUDM/LongBench (commit 2e00731, folder LongBench), Copyright (c) 2023 THU-KEG & Zhipu AI, under the
MIT licence, which the file contains.
"""

import dataclasses
import functools
import importlib.resources
import itertools
import json
import pathlib
import reprlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals import jsonl, longbench_metrics
from gemfilter_jax.evals.example import Example, token_count
from gemfilter_jax.evals.task import MOST_EXAMPLES, Task
from gemfilter_jax.settings import option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Dataset:
    """How questions of a dataset are asked, and how answers are scored.

    Attributes:
      language: "code" for both datasets of code.
      prompt: contains {context} once, and after it {input} at most once.
      new_tokens: maximum number of tokens of an answer.
      metric: see `longbench_metrics.score`.
      plain: whether the prompt is never wrapped in a chat template.
      first_line: whether only the first line of an answer is scored.
    """

    language: Literal["en", "zh", "code"]
    prompt: str
    new_tokens: int
    metric: str
    plain: bool
    first_line: bool

    @property
    def before(self) -> str:
        """The prompt before the text."""
        return self.prompt.partition("{context}")[0]

    def question(self, asked: str) -> str:
        """The prompt after the text, with a line's `input` filled in."""
        return self.prompt.partition("{context}")[2].replace("{input}", asked)


@functools.cache
def load() -> dict[str, Dataset]:
    """The 21 datasets by name."""
    file = importlib.resources.files("gemfilter_jax.evals.data").joinpath("longbench.json")
    return {name: Dataset(**fields) for name, fields in json.loads(file.read_text("utf-8"))["datasets"].items()}


@dataclasses.dataclass(frozen=True)
class LongBenchExample(Example):
    """An example; `classes` are the names of the classes where the task is to classify."""

    classes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Line:
    """A line of a file: the fields that examples are made of."""

    name: str
    dataset: str
    input: str
    context: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LongBench(Task):
    """Questions, summaries, few-shot tasks, counting, retrieval and code of LongBench; each dataset has its own metric.

    Files have the published format: each line is a JSON object with the fields `input`, `context`, `answers` and, where
    the task is to classify, `all_classes`. The dataset is that of the field `dataset` or, without it, of the file's
    name. Files of LongBench-E, whose names end in "_e", can be given one at a time.

    An answer's score is the best over its references. As published, some datasets are asked without a chat template,
    and of some answers only the first line counts. Unlike LongBench, generation does not end at line ends in samsum.

    By default no prompt is shortened: methods refuse a prompt that they cannot read, as they do in other tasks.

    Raises:
      UserError: an option is out of bounds, a dataset is unknown or missing, a file cannot be read, a line lacks a
        field or has an invalid one, or a dataset needs jieba, which is not installed.
    """

    name: ClassVar[str] = "longbench"
    title: ClassVar[str] = "LongBench"
    parts: ClassVar[str] = "dataset"
    main_score: ClassVar[str] = "score"
    sized: ClassVar[bool] = False
    scores_kept: ClassVar[bool] = False
    data: str | None = option(None, "Folder with LongBench's files, such as hotpotqa.jsonl, or one file.")
    datasets: str | None = option(
        None,
        "Datasets, separated by commas; by default all of a file, or the 14 English ones of a folder, without code.",
    )
    count: int | None = option(
        None, "Examples of each dataset, the first ones; all by default.", at_least=1, at_most=MOST_EXAMPLES
    )
    truncate: int | None = option(
        None, "Cut longer prompts to this many tokens, chat template excluded, by leaving out the middle.", at_least=2
    )

    def __post_init__(self):
        super().__post_init__()
        needed = [name for name in self._lines if not longbench_metrics.can_be_computed(load()[name].metric)]
        if needed:
            raise UserError(f"datasets {', '.join(needed)} need jieba; run `pip install gemfilter-jax[evals]`")

    @functools.cached_property
    def _lines(self) -> dict[str, list[_Line]]:
        """The lines by dataset; read at once, so that a mistake is reported before a model is loaded."""
        if self.data is None:
            raise UserError("data is not given; expected a folder with files such as hotpotqa.jsonl, or one such file")
        chosen = None if self.datasets is None else _names(self.datasets)
        path = pathlib.Path(self.data)
        if path.is_dir():
            chosen, paths = _files(path, chosen)
        else:
            paths = [path]
        lines: dict[str, list[_Line]] = {}
        for one in paths:
            for line in jsonl.read(str(one), "an example"):
                dataset = _dataset(line, one.stem)
                own = lines.setdefault(dataset, [])
                if (chosen is None or dataset in chosen) and (self.count is None or len(own) < self.count):
                    own.append(_line(line, dataset, f"{dataset} {len(own) + 1}"))
        if missing := [name for name in chosen or () if not lines.get(name)]:
            raise UserError(f"{path}: contains no example of {', '.join(missing)}")
        return {name: own for name, own in lines.items() if own}

    def examples(self, tokenizer: "PreTrainedTokenizerBase", tokens: int) -> Iterator[LongBenchExample]:
        """The examples of the datasets in order; those of an earlier text follow it.

        Args:
          tokens: not used.

        Raises:
          UserError: `truncate` leaves nothing of a text.
        """
        same_text: dict[str, list[_Line]] = {}
        for line in itertools.chain.from_iterable(self._lines.values()):
            same_text.setdefault(line.context, []).append(line)
        for line in itertools.chain.from_iterable(same_text.values()):
            yield self._example(tokenizer, line)

    def _example(self, tokenizer: "PreTrainedTokenizerBase", line: _Line) -> LongBenchExample:
        dataset = load()[line.dataset]
        text, question = line.context, dataset.question(line.input)
        if self.truncate is not None:
            text, question = _without_middle(tokenizer, dataset.before, text, question, self.truncate)
            if not text.strip() or not question.strip():
                raise UserError(
                    f"truncate is {self.truncate}: too little is left of the prompt of {line.name}; give more"
                )
        return LongBenchExample(
            name=line.name,
            text=text,
            question=question,
            references=line.answers,
            tokens=token_count(tokenizer, text),
            group=line.dataset,
            message_format=f"{dataset.before}{{text}}{{question}}",
            plain=dataset.plain,
            classes=line.classes,
        )

    def new_tokens(self, example: Example) -> int:
        """The dataset's length of answers."""
        return load()[example.group].new_tokens

    def score(self, example: Example, answer: str) -> dict[str, float]:
        """ "score": the dataset's metric, the best over the references."""
        dataset = load()[example.group]
        if dataset.first_line:
            answer = answer.lstrip("\n").split("\n")[0]
        classes = example.classes if isinstance(example, LongBenchExample) else ()
        return {
            "score": max(longbench_metrics.score(dataset.metric, answer, one, classes) for one in example.references)
        }


def _names(datasets: str) -> list[str]:
    """The datasets of a list with commas."""
    names = list(dict.fromkeys(name.strip() for name in datasets.split(",")))
    for name in names:
        if name not in load():
            raise UserError(f"datasets is {datasets!r}: {name!r} is unknown; one of {', '.join(load())}")
    return names


def _files(folder: pathlib.Path, chosen: list[str] | None) -> tuple[list[str], list[pathlib.Path]]:
    """The datasets of a folder and their files; by default, those English ones that it contains."""
    if chosen is None:
        english = [name for name, dataset in load().items() if dataset.language == "en"]
        chosen = [name for name in english if (folder / f"{name}.jsonl").is_file()]
        if not chosen:
            raise UserError(f"{folder}: contains none of the files {', '.join(f'{name}.jsonl' for name in english)}")
    return chosen, [folder / f"{name}.jsonl" for name in chosen]


def _dataset(line: jsonl.Line, stem: str) -> str:
    """The dataset of a line in a file whose name, without its ending, is `stem`."""
    given = line.text("dataset") if "dataset" in line.fields else stem
    name = given.removesuffix("_e")
    if name not in load():
        where = (
            "field 'dataset' is" if "dataset" in line.fields else "field 'dataset' is missing, and the file's name is"
        )
        raise UserError(f"{line.place}: {where} {reprlib.repr(given)}, expected one of {', '.join(load())}")
    return name


def _line(line: jsonl.Line, name: str, shown: str) -> _Line:
    """The line of a dataset.

    Raises:
      UserError: a field is missing or invalid.
    """
    dataset, asked, answers = load()[name], line.fields.get("input"), line.fields.get("answers")
    if not isinstance(asked, str) or asked.strip() or not dataset.question(asked).strip():
        asked = line.text("input")  # it may be blank where the prompt asks enough without it
    context = line.text("context")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{line.place}: field 'answers' {_found(line, 'answers')}, expected a list of strings")
    paragraph = longbench_metrics.PARAGRAPHS.get(dataset.metric)
    if paragraph and not all(map(paragraph.search, answers)):
        expected = f"strings with {paragraph.pattern!r}"
        raise UserError(f"{line.place}: field 'answers' {_found(line, 'answers')}, expected {expected}")
    classes = line.texts("all_classes") if dataset.metric == "classification" else ()
    return _Line(shown, name, asked, context, tuple(answers), classes)


def _found(line: jsonl.Line, field: str) -> str:
    return f"is {reprlib.repr(line.fields[field])}" if field in line.fields else "is missing"


def _without_middle(
    tokenizer: "PreTrainedTokenizerBase", before: str, text: str, question: str, tokens: int
) -> tuple[str, str]:
    """A text and its question without the middle tokens of a prompt with more than `tokens`, as LongBench's pred.py.

    The text is empty if the cut begins before it.
    """
    whole = f"{before}{text}{question}"
    encoded = tokenizer(whole, return_offsets_mapping=True, verbose=False)
    ends = list(itertools.accumulate((end for _, end in encoded["offset_mapping"]), max))
    if len(ends) <= tokens:
        return text, question
    start, end = ends[tokens // 2 - 1], ends[-(tokens // 2) - 1]  # what is cut; a token begins where the last one ends
    first, last = len(before), len(before) + len(text)
    if start <= first:
        return "", question
    return whole[first : min(start, last)] + whole[end:last], whole[last:start] + whole[max(end, last) :]
