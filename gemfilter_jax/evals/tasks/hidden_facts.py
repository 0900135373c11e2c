"""Facts of many kinds, hidden in long texts, and questions that ask for one or several of them.

The two splits share no template, vocabulary or text, so that settings learned on "train" are measured on "held_out".
Templates and vocabularies are in facts_train.json and facts_held_out.json.
"""

import dataclasses
import functools
import importlib.resources
import json
import pathlib
import random
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals import haystack, metrics
from gemfilter_jax.evals.example import Example
from gemfilter_jax.evals.task import MOST_EXAMPLES, Task
from gemfilter_jax.settings import option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SplitName = Literal["train", "held_out"]

_HAYSTACKS = {"train": "journal", "held_out": "essays"}
_NEW_TOKENS_PER_REFERENCE = 24
_TRIES = 1_000


@dataclasses.dataclass(frozen=True)
class Template:
    """A kind of fact. A slot is the name of a vocabulary in braces.

    Attributes:
      name: unique in its split.
      text: the fact, one sentence or a few.
      question: question for the value of `answer`; contains other slots only.
      several: question about several facts of this kind; a slot holds the values of all of them: "A, B and C".
      answer: the slot whose value a right answer contains.
      own_paragraph: whether these facts are always separate paragraphs, as announcements and log entries are.
    """

    name: str
    text: str
    question: str
    several: str
    answer: str
    own_paragraph: bool = False

    @functools.cached_property
    def slots(self) -> tuple[str, ...]:
        """The slots of `text`, in order."""
        return tuple(slot for _, slot, _, _ in string.Formatter().parse(self.text) if slot)


@dataclasses.dataclass(frozen=True)
class Split:
    """Templates, the values of their slots by vocabulary, and the paragraphs that facts are hidden in by default."""

    templates: tuple[Template, ...]
    vocabularies: Mapping[str, tuple[str, ...]]
    paragraphs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Fact:
    """A template with a value in each slot."""

    template: Template
    values: Mapping[str, str]

    @property
    def text(self) -> str:
        """The fact as hidden in the text."""
        return self.template.text.format(**self.values)

    @property
    def answer(self) -> str:
        """The value that a right answer contains."""
        return self.values[self.template.answer]

    def fits(self, others: Sequence["Fact"], hay: str) -> bool:
        """Whether the answers of this fact and of the others each occur in their own fact only.

        In addition, facts of the same template must not share a value.
        """
        answer, text = self.answer.lower(), self.text.lower()
        if answer in hay or text.count(answer) != 1:
            return False
        for other in others:
            if other.template is self.template and set(other.values.values()) & set(self.values.values()):
                return False
            if answer in other.text.lower() or other.answer.lower() in text:
                return False
        return True


@functools.cache
def load(split: str) -> Split:
    """The split of this name.

    Raises:
      UserError: the split does not exist.
    """
    if split not in _HAYSTACKS:
        raise UserError(f"split {split!r} is unknown; one of {', '.join(_HAYSTACKS)}")
    file = importlib.resources.files("gemfilter_jax.evals.data").joinpath(f"facts_{split}.json")
    fields = json.loads(file.read_text("utf-8"))
    return Split(
        templates=tuple(Template(**template) for template in fields["templates"]),
        vocabularies={name: _values(entry) for name, entry in fields["vocabularies"].items()},
        paragraphs=haystack.built_in(_HAYSTACKS[split]),
    )


def _values(entry: list[str] | dict[str, int]) -> tuple[str, ...]:
    if isinstance(entry, list):
        return tuple(entry)
    return tuple(map(str, range(entry["from"], entry["to"] + 1)))


@dataclasses.dataclass(frozen=True)
class HiddenFacts(Task):
    """Facts of about thirty kinds at random places, among others that look like them; an answer is right if it contains
    the key word of every fact it is asked for.

    Raises:
      UserError: an option is out of bounds, `per_text` and `facts` are both above 1, `texts` cannot be read, or the
        split does not exist.

    Attributes:
      split: split of the templates, the vocabularies and, without `texts` and `paragraphs`, the text.
      paragraphs: paragraphs of the haystack; None for those of `texts` or of the split.
    """

    name: ClassVar[str] = "hidden_facts"
    title: ClassVar[str] = "Hidden facts"
    count: int = option(60, "Questions of each length.", at_least=1, at_most=MOST_EXAMPLES)
    facts: int = option(1, "Facts of one kind that a question asks for.", at_least=1, at_most=4)
    distractors: int = option(2, "Facts in the text that look like the asked ones.", at_least=0, at_most=MOST_EXAMPLES)
    per_text: int = option(
        1, "Questions asked of each text, which is read once for them.", at_least=1, at_most=MOST_EXAMPLES
    )
    seed: int = option(0, "Random seed of the facts and their places.")
    texts: str | None = option(None, "Hide facts in the .txt and .md files of this folder.")
    split: SplitName = "held_out"
    paragraphs: tuple[str, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.per_text > 1 and self.facts > 1:
            raise UserError(f"per_text is {self.per_text}; such questions ask for one fact, but facts is {self.facts}")
        _ = self._material  # so that an unusable folder is reported before a model is loaded

    @functools.cached_property
    def _material(self) -> Split:
        """The split, with the paragraphs in which facts are hidden."""
        material = load(self.split)
        if self.paragraphs is not None:
            return dataclasses.replace(material, paragraphs=self.paragraphs)
        if self.texts is not None:
            return dataclasses.replace(material, paragraphs=haystack.read_folder(pathlib.Path(self.texts)))
        return material

    def examples(self, tokenizer: "PreTrainedTokenizerBase", tokens: int) -> Iterator[Example]:
        """`count` questions.

        With one question for each text, the questions cycle through the split's templates in an order drawn from the
        seed. Several questions about one text use different templates.

        Args:
          tokens: approximate length of each text, facts included.

        Raises:
          UserError: the text is too short for its facts, the vocabularies are too small for the number of facts, or the
            split has fewer than `per_text` templates.
        """
        if self.per_text == 1:
            yield from self._one_for_each_text(tokenizer, tokens)
            return
        for index, done in enumerate(range(0, self.count, self.per_text)):
            questions = min(self.per_text, self.count - done)
            yield from self._several_of_one_text(tokenizer, tokens, questions, self.seed + index)

    def _one_for_each_text(self, tokenizer: "PreTrainedTokenizerBase", tokens: int) -> Iterator[Example]:
        material = self._material
        templates = random.Random(self.seed).sample(material.templates, len(material.templates))
        for index in range(self.count):
            rng = random.Random(f"{self.split} {self.seed} {index}")
            chosen = [templates[index % len(templates)]] * (self.facts + self.distractors)
            text, drawn, spans = _hide(tokenizer, tokens, material, chosen, rng)
            yield _example(text, drawn[: self.facts], spans[: self.facts], tokens)

    def _several_of_one_text(
        self, tokenizer: "PreTrainedTokenizerBase", tokens: int, count: int, seed: int
    ) -> Iterator[Example]:
        material = self._material
        if count > len(material.templates):
            raise UserError(
                f"{count} facts of different templates were asked for; {self.split} has {len(material.templates)}"
            )
        rng = random.Random(f"{self.split} {seed} document")
        chosen = rng.sample(material.templates, count) * (1 + self.distractors)
        text, drawn, spans = _hide(tokenizer, tokens, material, chosen, rng)
        for index in range(count):
            yield _example(text, [drawn[index]], [spans[index]], tokens)

    def new_tokens(self, example: Example) -> int:
        """24 tokens for each reference."""
        return _NEW_TOKENS_PER_REFERENCE * len(example.references)

    def score(self, example: Example, answer: str) -> dict[str, float]:
        """ "right": the answer contains every reference."""
        return {"right": float(metrics.contains_all(answer, example.references))}


def _example(text: str, facts: Sequence[Fact], spans: Sequence[tuple[int, int]], tokens: int) -> Example:
    template = facts[0].template
    if len(facts) == 1:
        question = template.question.format(**facts[0].values)
    else:
        question = template.several.format(
            **{slot: _listed([fact.values[slot] for fact in facts]) for slot in template.slots}
        )
    return Example(
        name=template.name,
        text=text,
        question=question,
        references=tuple(fact.answer for fact in facts),
        spans=tuple(spans),
        tokens=tokens,
    )


def _listed(values: Sequence[str]) -> str:
    return f"{', '.join(values[:-1])} and {values[-1]}"


def _hide(
    tokenizer: "PreTrainedTokenizerBase",
    tokens: int,
    material: Split,
    templates: Sequence[Template],
    rng: random.Random,
) -> tuple[str, list[Fact], list[tuple[int, int]]]:
    """A text of about `tokens` tokens with one fact of each template, the facts, and their spans."""
    hay = haystack.pile(tokenizer, material.paragraphs, tokens, rng.getrandbits(32))
    lower, facts = hay.text.lower(), []
    for template in templates:
        facts.append(_draw(template, material.vocabularies, facts, lower, rng))
    beside = haystack.tokens_besides(tokenizer, [fact.text for fact in facts], tokens)
    text, spans = _insert(hay.first(beside), facts, rng)
    return text, facts, spans


def _draw(
    template: Template, vocabularies: Mapping[str, Sequence[str]], others: Sequence[Fact], hay: str, rng: random.Random
) -> Fact:
    for _ in range(_TRIES):
        fact = Fact(template, {slot: rng.choice(vocabularies[slot]) for slot in template.slots})
        if fact.fits(others, hay):
            return fact
    alike = sum(other.template is template for other in others)
    raise UserError(
        f"no value is left for fact {alike + 1} of template {template.name!r} that is not in the text already; "
        "ask for fewer facts and distractors"
    )


def _insert(hay: str, facts: Sequence[Fact], rng: random.Random) -> tuple[str, list[tuple[int, int]]]:
    """Insert each fact at a random place, and use an offset twice only if no other is free; returns text and spans."""
    kinds, taken = haystack.places(hay), []
    for fact in facts:
        places = kinds["paragraph" if fact.template.own_paragraph else rng.choice(list(kinds))]
        used = {place.offset for place in taken}
        taken.append(rng.choice([place for place in places if place.offset not in used] or places))
    return haystack.insert(hay, [fact.text for fact in facts], taken)
