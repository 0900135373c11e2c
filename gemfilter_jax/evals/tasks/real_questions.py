"""Questions about real documents, read from a file of L-Eval (arXiv 2307.11088)."""

import dataclasses
import functools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals import jsonl, metrics
from gemfilter_jax.evals.example import Example, token_count
from gemfilter_jax.evals.task import MOST_EXAMPLES, Task
from gemfilter_jax.settings import option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gemfilter_jax.results import KeptText

CHOICE = "multiple choice"
VERBATIM = "verbatim"
OTHER = "other"

_SEPARATOR = "\n\n"
_MOST_OCCURRENCES = 5
_SAYS_NOTHING = ("yes", "no")
_NEW_TOKENS = {CHOICE: 32, VERBATIM: 64, OTHER: 64}

_OPTION_ON_LINE = re.compile(r"^[ \t]*\(([A-Z])\)", re.MULTILINE)
_OPTION_ANYWHERE = re.compile(r"(?<!\S)\(([A-Z])\)")
_LEADING_LETTER = re.compile(r"\s*(?:\(([A-Z])\)|([A-Z])[).:](?!\w))\s*")
_TEXT_OF_OPTION = " \N{BULLET} "
_ONE_LETTER = re.compile("[A-Za-z]")
_LOWER_LETTER = re.compile(r"\W*([a-z])\W*")
_LETTER = re.compile(
    r"""
      \(\s*([A-Za-z])\s*\)  # (B)
    | (?<![\w'’])([A-Za-z])\)  # B)
    | (?:
        ^\W*  # B at the start of a line
      | \b(?i:answer|option|choice|choose|pick|letter|think|say|is|be|s|and|or|both|either)\b\W*
      | (?<=\b[A-Z])\s*[,/&]\s*
      )
      ([A-Z])(?!['’-]?\w)
      (?:(?<![AI])|(?![ \t]+(?!(?i:because|since|is|and|or)\b)\w))  # "A man" and "I think" name no choice
    """,
    re.MULTILINE | re.VERBOSE,
)


@dataclasses.dataclass(frozen=True)
class QuestionOfOne(Example):
    """A question about one document of a text.

    Attributes:
      own: character range of the document in `text`.
      occurrences: character ranges of the reference in the document, where it is verbatim.
    """

    own: tuple[int, int] = (0, 0)
    occurrences: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a document.

    Attributes:
      name: the numbers of the document and of the question in the file, from 1: "3.7".
      answer: the reference.
    """

    name: str
    text: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Document:
    """A document and its questions."""

    text: str
    questions: tuple[Question, ...]


@dataclasses.dataclass(frozen=True)
class RealQuestions(Task):
    """Questions about real documents, from a file in the format of L-Eval; an answer is right if it contains the
    reference or, in multiple choice, names the right letter.

    A line of the file is a JSON object with a document `input`, its questions `instructions` and, in the same order,
    the reference answers `outputs`; other fields are ignored. White space around a document is left out. Lines with the
    same document are one document.

    The examples' groups are "multiple choice", where the question lists options "(A) ... (B) ..." and the reference
    begins with the letter of one; "verbatim", where the reference stands in its document, case, punctuation and white
    space aside; and "other". References that stand there more than 5 times, "yes" and "no" are not "verbatim", because
    they are easily kept by chance.

    Raises:
      UserError: `questions_file` is missing or faulty, or another option is out of bounds.
    """

    name: ClassVar[str] = "real_questions"
    title: ClassVar[str] = "Questions about real documents"
    parts: ClassVar[str] = "kind of question"
    sized: ClassVar[bool] = False
    questions_file: str | None = option(
        None, "JSONL file with the fields input (a text), instructions (questions) and outputs (answers). Required."
    )
    join: int = option(
        1,
        "Documents in each text, one after another; a question still asks of its own.",
        at_least=1,
        at_most=MOST_EXAMPLES,
    )
    only: Literal["all", "multiple choice", "verbatim", "other"] = option(
        "all", "Ask all questions, or those of one group: verbatim ones have their answer in the document."
    )
    count: int | None = option(None, "Most questions to ask. Default: all.", at_least=1, at_most=MOST_EXAMPLES)
    seed: int = option(0, "Random seed of the documents' order.")

    def __post_init__(self):
        super().__post_init__()
        _ = self._documents  # so that a faulty file is reported before a model is loaded

    @functools.cached_property
    def _documents(self) -> tuple[Document, ...]:
        """The different documents in the order of the file."""
        if self.questions_file is None:
            raise UserError(
                "questions_file is missing; give a JSONL file with the fields input, instructions and outputs"
            )
        questions: dict[str, list[Question]] = {}
        for number, line in enumerate(jsonl.read(self.questions_file, "a document with questions"), 1):
            questions.setdefault(line.text("input").strip(), []).extend(_questions(number, line))
        return tuple(Document(text, tuple(asked)) for text, asked in questions.items())

    def examples(self, tokenizer: "PreTrainedTokenizerBase", tokens: int) -> Iterator[Example]:
        """The questions, document by document in an order drawn from the seed; named by document and question: "3.7".

        Each document is in one text; the last text may hold fewer than `join`.
        """
        order = random.Random(self.seed).sample(self._documents, len(self._documents))
        asked = 0
        for first in range(0, len(order), self.join):
            for example in _examples(tokenizer, order[first : first + self.join]):
                if self.only not in ("all", example.group):
                    continue
                if asked == self.count:
                    return
                yield example
                asked += 1
        if not asked:
            raise UserError(f"only is {self.only!r}: no question of {self.questions_file} is of that group")

    def new_tokens(self, example: Example) -> int:
        """32 tokens for multiple choice, otherwise 64."""
        return _NEW_TOKENS[example.group]

    def score(self, example: Example, answer: str) -> dict[str, float]:
        """ "right", and "f1": the F1 of the words that answer and reference share.

        In multiple choice, "right" compares letters, see `chosen`, and "f1" the texts behind them. Otherwise the answer
        must contain the words of the reference, articles and punctuation aside.
        """
        (reference,) = example.references
        if example.group == CHOICE:
            letter, text = _split_choice(reference)
            right = chosen(answer, options(example.question)) == letter
            return {"right": float(right), "f1": metrics.token_f1(_split_choice(answer)[1], text)}
        right = f" {_plain(reference)} " in f" {_plain(answer)} "
        return {"right": float(right), "f1": metrics.token_f1(answer, reference)}

    def score_kept(self, example: Example, kept: "KeptText") -> dict[str, float]:
        """Scores of the kept passages.

        "kept", of verbatim references: 1.0 if a passage holds an occurrence of the reference in its own document.
        "own_document", of joined documents: the share of the kept characters that are in the question's document.
        """
        assert isinstance(example, QuestionOfOne)
        start, end = example.own
        own = [(max(first, start), min(last, end)) for first, last in kept.spans if first < end and last > start]
        scores = {}
        if example.group == VERBATIM:
            held = (low <= first and last <= high for first, last in example.occurrences for low, high in own)
            scores["kept"] = float(any(held))
        total = sum(last - first for first, last in kept.spans)
        if total and end - start < len(example.text):
            scores["own_document"] = sum(last - first for first, last in own) / total
        return scores


def _questions(number: int, line: jsonl.Line) -> list[Question]:
    """The questions about document `number`."""
    questions, answers = line.texts("instructions"), line.texts("outputs")
    if len(questions) != len(answers):
        raise UserError(
            f"{line.place}: {len(questions)} instructions but {len(answers)} outputs, expected one output for each"
        )
    return [
        Question(f"{number}.{index}", question, answer)
        for index, (question, answer) in enumerate(zip(questions, answers, strict=True), 1)
    ]


def _examples(tokenizer: "PreTrainedTokenizerBase", documents: Sequence[Document]) -> Iterator[QuestionOfOne]:
    text = _SEPARATOR.join(document.text for document in documents)
    tokens = token_count(tokenizer, text)
    start = 0
    for document in documents:
        letters = _Letters.of(document.text)
        for question in document.questions:
            group, spans = _group(letters, question)
            occurrences = tuple((start + first, start + last) for first, last in spans)
            yield QuestionOfOne(
                name=question.name,
                text=text,
                question=question.text,
                references=(question.answer,),
                tokens=tokens,
                spans=occurrences[:1],
                occurrences=occurrences,
                group=group,
                own=(start, start + len(document.text)),
            )
        start += len(document.text) + len(_SEPARATOR)


def _group(document: "_Letters", question: Question) -> tuple[str, list[tuple[int, int]]]:
    """The group of a question and, if its answer stands verbatim in the document, the spans where it does."""
    if _split_choice(question.answer)[0] in options(question.text):
        return CHOICE, []
    reference = _Letters.of(question.answer).text
    spans = [] if reference in _SAYS_NOTHING else document.find(reference)
    return (VERBATIM, spans) if 0 < len(spans) <= _MOST_OCCURRENCES else (OTHER, [])


@dataclasses.dataclass(frozen=True)
class _Letters:
    """The letters and digits of a text in lower case, to compare texts without case, punctuation and white space.

    Attributes:
      text: the letters and digits, with nothing between them.
      places: character offset of each in the original text.
      starts, ends: the offsets at which words begin and end.
    """

    text: str
    places: tuple[int, ...]
    starts: frozenset[int]
    ends: frozenset[int]

    @classmethod
    def of(cls, original: str) -> "_Letters":
        marks = [(mark, at) for at, character in enumerate(original) for mark in character.lower() if mark.isalnum()]
        words = list(re.finditer(r"[^\W_]+", original))
        return cls(
            "".join(mark for mark, _ in marks),
            tuple(at for _, at in marks),
            frozenset(word.start() for word in words),
            frozenset(word.end() for word in words),
        )

    def find(self, wanted: str) -> list[tuple[int, int]]:
        """Spans in the original text of whole words whose letters and digits are `wanted`; they do not overlap.

        None if `wanted` is empty.
        """
        spans, at = [], self.text.find(wanted) if wanted else -1
        while at >= 0:
            start, end = self.places[at], self.places[at + len(wanted) - 1] + 1
            whole = start in self.starts and end in self.ends
            if whole:
                spans.append((start, end))
            at = self.text.find(wanted, at + (len(wanted) if whole else 1))
        return spans


def _plain(text: str) -> str:
    """The normalised text, or only its case and white space where nothing else is left, as of the answer "A"."""
    return metrics.normalised(text) or " ".join(text.lower().split())


def options(question: str) -> dict[str, str]:
    """The options "(A) ... (B) ..." that a question ends with, text by letter; empty if there are fewer than two.

    If options begin lines, letters within lines are part of their texts.
    """
    for pattern in (_OPTION_ON_LINE, _OPTION_ANYWHERE):
        marks = list(pattern.finditer(question))
        letters = [mark[1] for mark in marks]
        if len(letters) > 1 and letters == [chr(ord("A") + index) for index in range(len(letters))]:
            ends = [*(mark.start() for mark in marks[1:]), len(question)]
            return {mark[1]: question[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)}
    return {}


def _split_choice(answer: str) -> tuple[str, str]:
    """The letter with which an answer such as "(B) a lamp" or "B. a lamp" begins, and the rest; no letter is ""."""
    mark = _LEADING_LETTER.match(answer)
    return (mark[1] or mark[2], answer[mark.end() :].strip()) if mark else ("", answer.strip())


def chosen(answer: str, choices: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer names; None if it names none, or several.

    An answer names options by letters, as in "(B)", "B", "b.", "B) a lamp" or "The answer is B", or, without any
    letter, by the full text of an option. Letters within an option's text do not count, nor does the article "A".
    """
    found, rest = set(), answer
    for letter, text in sorted(choices.items(), key=lambda choice: -len(choice[1])):
        words = text.rstrip(" .").split()
        if words and not _ONE_LETTER.fullmatch(" ".join(words)):
            rest, times = re.subn(_whole(words), _TEXT_OF_OPTION, rest)
            found |= {letter} if times else set()
    letters = _letters(rest, choices) or found
    return letters.pop() if len(letters) == 1 else None


def _whole(words: Sequence[str]) -> str:
    """A pattern for words that follow one another, in any case and with any white space."""
    pattern = r"\s+".join(map(re.escape, words))
    return rf"(?i)(?<!\w){pattern}(?!\w)"


def _letters(answer: str, choices: Mapping[str, str]) -> set[str]:
    """The letters of options that an answer names, up to an option's text that the answer's end cuts short."""
    if alone := _LOWER_LETTER.fullmatch(answer):
        return {alone[1].upper()} & set(choices)
    named = set()
    for mark in _LETTER.finditer(answer):
        letter = (mark[1] or mark[2] or mark[3]).upper()
        if letter in choices:
            named.add(letter)
            rest = " ".join(answer[mark.end() :].strip(" .:)").lower().split())
            if rest and " ".join(choices[letter].lower().split()).startswith(rest):
                break
    return named
