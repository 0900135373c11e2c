"""Many facts of many forms, hidden in long texts, and questions that ask for one or several of them.

The two splits share no template, no vocabulary and no text: what is learned on "train" is measured on "held_out".
Templates and vocabularies are in facts_train.json and facts_held_out.json.
"""

import dataclasses
import functools
import importlib.resources
import json
import random
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals import haystack
from gemfilter_jax.evals.examples import Case

SplitName = Literal["train", "held_out"]

_HAYSTACKS = {"train": "journal", "held_out": "essays"}
_TRIES = 1_000
_SENTENCE_END = re.compile(r"""(?<!\b[A-Z])(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)[.!?]["'”’)]*(?= ["'“‘(]?[A-Z])""")
_PARAGRAPH_BREAK = "\n\n"


@dataclasses.dataclass(frozen=True)
class Template:
    """A kind of fact. Slots are vocabularies' names in braces.

    Attributes:
      name: unique in its split.
      text: the fact, one sentence or a few.
      question: asks for `answer`, which is not among its slots.
      several: asks for it of several such facts at once; its slot is filled with all of theirs: "A, B and C".
      answer: the slot whose value a right answer contains.
      own_paragraph: such facts (announcements, log entries) stand between paragraphs, never in one.
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
        """As it is hidden."""
        return self.template.text.format(**self.values)

    @property
    def answer(self) -> str:
        """What a right answer contains."""
        return self.values[self.template.answer]

    def fits(self, others: Sequence["Fact"], hay: str) -> bool:
        """Whether its answer, and those of the others, are each found in their own fact alone.

        Facts of one template have no value in common.
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
    """A split by its name.

    Raises:
      UserError: there is no such split.
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


def cases(
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    count: int,
    *,
    split: SplitName = "held_out",
    facts: int = 1,
    distractors: int = 2,
    seed: int = 0,
    paragraphs: Sequence[str] | None = None,
) -> Iterator[Case]:
    """Questions, each of a text of its own; the split's templates take turns in an order drawn from the seed.

    Args:
      tokens: about how many each text has, facts included.
      facts: how many of one template each question asks for.
      distractors: how many more of that template, with other values, are in the text.
      paragraphs: the haystack; the split's own if None.

    Raises:
      UserError: the text would be too short for its facts, or the vocabularies are too small for so many.
    """
    material = load(split)
    templates = random.Random(seed).sample(material.templates, len(material.templates))
    for index in range(count):
        rng = random.Random(f"{split} {seed} {index}")
        template = templates[index % len(templates)]
        chosen = [template] * (facts + distractors)
        text, drawn, spans = _hide(tokenizer, tokens, material, chosen, paragraphs, rng)
        yield _case(text, drawn[:facts], spans[:facts], tokens)


def document(
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    count: int,
    *,
    split: SplitName = "held_out",
    distractors: int = 0,
    seed: int = 0,
    paragraphs: Sequence[str] | None = None,
) -> list[Case]:
    """One text with `count` facts of different templates in it, each asked for by a question of its own.

    Args:
      tokens, paragraphs: as in `cases`.
      distractors: how many more of each template, with other values, are in the text.

    Raises:
      UserError: as in `cases`, or the split has fewer templates.
    """
    material = load(split)
    if count > len(material.templates):
        raise UserError(f"{count} facts of different templates were asked for; {split} has {len(material.templates)}")
    rng = random.Random(f"{split} {seed} document")
    templates = rng.sample(material.templates, count)
    chosen = templates * (1 + distractors)
    text, drawn, spans = _hide(tokenizer, tokens, material, chosen, paragraphs, rng)
    return [_case(text, [drawn[index]], [spans[index]], tokens) for index in range(count)]


def _case(text: str, facts: Sequence[Fact], spans: Sequence[tuple[int, int]], tokens: int) -> Case:
    template = facts[0].template
    if len(facts) == 1:
        question = template.question.format(**facts[0].values)
    else:
        question = template.several.format(
            **{slot: _listed([fact.values[slot] for fact in facts]) for slot in template.slots}
        )
    return Case(
        name=template.name,
        text=text,
        question=question,
        answers=tuple(fact.answer for fact in facts),
        spans=tuple(spans),
        tokens=tokens,
    )


def _listed(values: Sequence[str]) -> str:
    return f"{', '.join(values[:-1])} and {values[-1]}"


def _hide(
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    material: Split,
    templates: Sequence[Template],
    paragraphs: Sequence[str] | None,
    rng: random.Random,
) -> tuple[str, list[Fact], list[tuple[int, int]]]:
    """A fact of each template in a text of about `tokens` tokens, and where each is."""
    hay = haystack.pile(tokenizer, paragraphs or material.paragraphs, tokens, rng.getrandbits(32))
    lower, facts = hay.text.lower(), []
    for template in templates:
        facts.append(_draw(template, material.vocabularies, facts, lower, rng))
    added = len(tokenizer(_PARAGRAPH_BREAK.join(fact.text for fact in facts), add_special_tokens=False)["input_ids"])
    if added >= tokens:
        raise UserError(f"{len(facts)} facts take {added} tokens, the text is to have {tokens}; ask for a longer one")
    text, spans = _insert(hay.first(tokens - added), facts, rng)
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


@dataclasses.dataclass(frozen=True, order=True)
class _Place:
    """Where a fact can be put; of several at one offset, those that end a paragraph go first (`rank`)."""

    offset: int
    rank: int
    before: str
    after: str


def _places(hay: str) -> dict[str, list[_Place]]:
    """By kind: as a paragraph, at a paragraph's start or end, or between two of its sentences."""
    breaks = [match.start() for match in re.finditer(_PARAGRAPH_BREAK, hay)]
    starts = [0, *(offset + len(_PARAGRAPH_BREAK) for offset in breaks)]
    return {
        "paragraph": [_Place(0, 1, "", _PARAGRAPH_BREAK), *(_Place(end, 1, _PARAGRAPH_BREAK, "") for end in breaks)],
        "start": [_Place(start, 2, "", " ") for start in starts],
        "end": [_Place(end, 0, " ", "") for end in breaks],
        "inside": [_Place(match.end(), 0, " ", "") for match in _SENTENCE_END.finditer(hay)],
    }


def _insert(hay: str, facts: Sequence[Fact], rng: random.Random) -> tuple[str, list[tuple[int, int]]]:
    """Put each fact at a place drawn at random, none where another is while there are free ones."""
    kinds = {kind: places for kind, places in _places(hay).items() if places}
    taken: dict[int, _Place] = {}
    for index, fact in enumerate(facts):
        places = kinds["paragraph" if fact.template.own_paragraph else rng.choice(list(kinds))]
        used = {place.offset for place in taken.values()}
        taken[index] = rng.choice([place for place in places if place.offset not in used] or places)
    pieces, length, read = [], 0, 0
    spans = [(0, 0)] * len(facts)
    for index in sorted(taken, key=taken.__getitem__):
        place = taken[index]
        pieces += [hay[read : place.offset], place.before, facts[index].text, place.after]
        start = length + len(pieces[-4]) + len(place.before)
        spans[index] = (start, start + len(facts[index].text))
        length, read = spans[index][1] + len(place.after), place.offset
    return "".join([*pieces, hay[read:]]), spans
