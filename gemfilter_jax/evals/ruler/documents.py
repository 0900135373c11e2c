"""Paragraphs and questions of SQuAD and HotpotQA, for RULER's questions about documents."""

import dataclasses
import json
import pathlib
import random
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from gemfilter_jax import files
from gemfilter_jax.errors import UserError
from gemfilter_jax.evals.ruler import drafts


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about paragraphs, which are given by their indices.

    Attributes:
      answers: alternatives.
      gold: the paragraphs that hold the answer.
      own: the paragraphs of every text of this question; contains `gold`.
      related: paragraphs of the same article, which come before others.
    """

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    own: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Documents:
    """The different paragraphs of a file, and its questions."""

    paragraphs: tuple[str, ...]
    questions: tuple[Question, ...]

    def others(self, question: Question, rng: random.Random) -> Iterator[str]:
        """Endlessly, paragraphs that are not a question's own: first the related ones, then the rest, in random order.

        If they are used up, all are repeated in a new order.
        """
        used = {*question.own, *question.related}
        rest = [index for index in range(len(self.paragraphs)) if index not in used]
        for indices in (question.related, rest):
            for index in rng.sample(indices, len(indices)):
                yield self.paragraphs[index]
        for index in drafts.shuffled(rng, [*question.related, *rest]):
            yield self.paragraphs[index]


def read_squad(path: pathlib.Path) -> Documents:
    """The paragraphs of a file of SQuAD v2.0 (arXiv 1806.03822), and its answerable questions.

    Raises:
      UserError: the file cannot be read, has another format, or has no such question or fewer than two paragraphs.
    """
    articles = [
        [(one.member("context").text(), one.member("qas").items()) for one in article.member("paragraphs").items()]
        for article in _parsed(path, "SQuAD v2.0").member("data").items()
    ]
    texts = sorted({text for article in articles for text, _ in article})
    number = {text: index for index, text in enumerate(texts)}
    questions = []
    for article in articles:
        indices = dict.fromkeys(number[text] for text, _ in article)
        for text, entries in article:
            related = tuple(index for index in indices if index != number[text])
            for one in entries:
                if one.member("is_impossible").flag():
                    continue
                given = one.member("answers")
                answers = dict.fromkeys(each.member("text").text() for each in given.items())
                if not answers:
                    given.refuse("one or more answers")
                asked, gold = one.member("question").text(), (number[text],)
                questions.append(Question(asked, tuple(answers), gold, gold, related))
    return _checked(Documents(tuple(texts), tuple(questions)), path, "SQuAD v2.0")


def read_hotpotqa(path: pathlib.Path) -> Documents:
    """The paragraphs of a file of HotpotQA's distractor setting (arXiv 1809.09600), each with its title, and questions.

    Raises:
      UserError: the file cannot be read, has another format, or contains fewer paragraphs than a question needs.
    """
    entries = []
    for one in _parsed(path, "HotpotQA, distractor setting").items():
        paragraphs = {}
        for pair in one.member("context").items():
            title, sentences = pair.pair()
            paragraphs[title.text()] = "".join(sentence.text(blank=True) for sentence in sentences.items())
        titles = dict.fromkeys(fact.pair()[0].text() for fact in one.member("supporting_facts").items())
        gold = [f"{title}\n{paragraphs[title]}" for title in titles if title in paragraphs]
        if not gold:
            one.member("supporting_facts").refuse("titles of 'context'")
        own = [f"{title}\n{text}" for title, text in paragraphs.items()]
        entries.append((one.member("question").text(), one.member("answer").text(), gold, own))
    texts = sorted({text for *_, own in entries for text in own})
    number = {text: index for index, text in enumerate(texts)}
    questions = (
        Question(asked, (answer,), tuple(number[text] for text in gold), tuple(number[text] for text in own))
        for asked, answer, gold, own in entries
    )
    return _checked(Documents(tuple(texts), tuple(questions)), path, "HotpotQA, distractor setting")


def _checked(documents: Documents, path: pathlib.Path, published: str) -> Documents:
    if not documents.questions:
        raise UserError(f"{path}: contains no question with an answer, expected some ({published})")
    if len(documents.paragraphs) <= max(len(question.own) for question in documents.questions):
        raise UserError(f"{path}: contains no paragraphs besides those of one question, expected others ({published})")
    return documents


@dataclasses.dataclass(frozen=True)
class _Node:
    """A value in a JSON file, and its place in error messages; the methods refuse values of another form."""

    value: Any
    file: str
    place: str
    published: str

    def refuse(self, expected: str) -> NoReturn:
        found = f"{self.place or 'the whole'} is {reprlib.repr(self.value)}"
        raise UserError(f"{self.file}: {found}, expected {expected} ({self.published})")

    def member(self, name: str) -> "_Node":
        if not isinstance(self.value, dict) or name not in self.value:
            self.refuse(f"an object with the field {name!r}")
        place = f"{self.place}.{name}" if self.place else name
        return dataclasses.replace(self, value=self.value[name], place=place)

    def items(self) -> Sequence["_Node"]:
        if not isinstance(self.value, list):
            self.refuse("a list")
        return [
            _Node(item, self.file, f"{self.place}[{index}]", self.published) for index, item in enumerate(self.value)
        ]

    def pair(self) -> tuple["_Node", "_Node"]:
        items = self.items()
        if len(items) != 2:
            self.refuse("a list of two")
        return items[0], items[1]

    def text(self, blank: bool = False) -> str:
        if not isinstance(self.value, str) or not (blank or self.value.strip()) or not _is_unicode(self.value):
            self.refuse("a text")
        return self.value

    def flag(self) -> bool:
        if not isinstance(self.value, bool):
            self.refuse("true or false")
        return self.value


def _is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogates, which JSON can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parsed(path: pathlib.Path, published: str) -> _Node:
    text = files.read_text(path, str(path))
    try:
        return _Node(json.loads(text), str(path), "", published)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}), expected {published}") from error
