"""Facts and questions that share no content word, so that nothing but knowledge ties one to the other.

The method is that of NoLiMa (arXiv 2502.05167); the facts are others. They are in no_literal_match.json.
"""

import dataclasses
import functools
import importlib.resources
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals import haystack, metrics
from gemfilter_jax.evals.example import Example
from gemfilter_jax.evals.task import MOST_EXAMPLES, Task
from gemfilter_jax.settings import option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Hop = Literal["one", "two"]

_HOPS: dict[str, tuple[Hop, ...]] = {"one": ("one",), "two": ("two",), "both": ("one", "two")}
_NEW_TOKENS = 24
_GOLDEN_RATIO = (5**0.5 - 1) / 2  # its multiples modulo 1 fill [0, 1) evenly, however many they are


@dataclasses.dataclass(frozen=True)
class Fact:
    """A fact about a person, and two questions for the person's name.

    No fact of the set answers a question about another one, and none contains a content word of any question.

    Attributes:
      name: unique in the set.
      kind: the field of knowledge. Facts of one kind are never in the same text.
      text: the fact, with the slot {name}.
      one: question that one step of knowledge ties to the fact: the Taj Mahal is in Agra.
      two: question that two steps tie to the fact: the Taj Mahal is in Agra, and Agra in Uttar Pradesh.
      why: these steps, for readers.
    """

    name: str
    kind: str
    text: str
    one: str
    two: str
    why: str

    def of(self, person: str) -> str:
        """The fact about a person of this name."""
        return self.text.format(name=person)

    def question(self, hop: Hop) -> str:
        """The question that is so many steps away from the fact."""
        return self.one if hop == "one" else self.two


@functools.cache
def load() -> tuple[tuple[Fact, ...], tuple[str, ...]]:
    """The facts, and the names of the people that they can be about."""
    file = importlib.resources.files("gemfilter_jax.evals.data").joinpath("no_literal_match.json")
    fields = json.loads(file.read_text("utf-8"))
    return tuple(Fact(**fact) for fact in fields["facts"]), tuple(fields["names"])


@dataclasses.dataclass(frozen=True)
class NoLiteralMatch(Task):
    """Facts asked for by questions that share no content word with them, as in NoLiMa (arXiv 2502.05167): only
    knowledge ties "the Taj Mahal" to "Agra" (one hop) or "Uttar Pradesh" (two hops). An answer is right if it contains
    the name of the person whom the fact is about.

    Raises:
      UserError: an option is out of bounds, `texts` cannot be read, or there are too few facts of different kinds, or
        too few names that the texts do not contain, for the number of distractors.
    """

    name: ClassVar[str] = "no_literal_match"
    title: ClassVar[str] = "Facts that share no word with their questions"
    parts: ClassVar[str] = "steps of knowledge"
    hops: Literal["one", "two", "both"] = option("both", "Steps of knowledge from a fact to its question.")
    split: Literal["all", "train", "held_out"] = option(
        "all", "Ask for every fact, or for those of one half, of which train is the one that presets are learned on."
    )
    count: int | None = option(
        None, "Questions of each length; each fact once per hop if unset.", at_least=1, at_most=MOST_EXAMPLES
    )
    distractors: int = option(
        2, "Facts in the text about other people and of other kinds.", at_least=0, at_most=MOST_EXAMPLES
    )
    seed: int = option(0, "Random seed of the names, the facts and their places.")
    texts: str | None = option(None, "Hide facts in the .txt and .md files of this folder.")

    def __post_init__(self):
        super().__post_init__()
        kinds = len({fact.kind for fact in load()[0]})
        if self.distractors >= kinds:
            raise UserError(f"distractors is {self.distractors}: the facts are of {kinds} kinds; ask for fewer")
        if self.distractors >= len(self._names):
            raise UserError(
                f"distractors is {self.distractors}: {len(self._names)} of the names are not in the texts already; "
                "ask for fewer or give other texts"
            )

    @functools.cached_property
    def _paragraphs(self) -> tuple[str, ...]:
        """The paragraphs in which facts are hidden."""
        return haystack.of_folder_or_essays(self.texts)

    @functools.cached_property
    def _names(self) -> tuple[str, ...]:
        """The names that the paragraphs do not contain."""
        text = "\n\n".join(self._paragraphs).lower()
        return tuple(name for name in load()[1] if name.lower() not in text)

    @property
    def _own_facts(self) -> tuple[Fact, ...]:
        """The facts that are asked for."""
        facts = load()[0]
        return facts if self.split == "all" else facts[0 if self.split == "train" else 1 :: 2]

    def examples(self, tokenizer: "PreTrainedTokenizerBase", tokens: int) -> Iterator[Example]:
        """`count` examples, in an order of the facts drawn from the seed; hops alternate if both are asked for.

        Each example has its own text, names and distractors. The depths of any number of successive examples are spread
        evenly over the text.

        Raises:
          UserError: the text is too short for its facts.
        """
        facts, own = load()[0], self._own_facts
        order = random.Random(f"{self.name} {self.seed}")
        shuffled, first_depth = order.sample(own, len(own)), order.random()
        hops = _HOPS[self.hops]
        rounds = range(len(hops))
        cases: list[tuple[Fact, Hop]] = [
            (fact, hops[(i + turn) % len(hops)]) for turn in rounds for i, fact in enumerate(shuffled)
        ]
        count = len(cases) if self.count is None else self.count
        for index, (fact, hop) in enumerate(itertools.islice(itertools.cycle(cases), count)):
            rng = random.Random(f"{self.name} {self.seed} {index}")
            chosen = [fact, *_of_other_kinds(fact, facts, self.distractors, rng)]
            names = rng.sample(self._names, len(chosen))
            written = [one.of(name) for one, name in zip(chosen, names, strict=True)]
            beside = haystack.tokens_besides(tokenizer, written, tokens)
            hay = haystack.pile(tokenizer, self._paragraphs, beside, rng.getrandbits(32)).first(beside)
            depth = (first_depth + index * _GOLDEN_RATIO) % 1
            text, spans = haystack.insert(hay, written, _places(hay, len(written), depth, rng))
            yield Example(
                name=f"{fact.name}, {hop}",
                text=text,
                question=fact.question(hop),
                references=(names[0],),
                tokens=tokens,
                spans=(spans[0],),
                group="one hop" if hop == "one" else "two hops",
            )

    def new_tokens(self, example: Example) -> int:
        """24 tokens, enough for a sentence around the name."""
        return _NEW_TOKENS

    def score(self, example: Example, answer: str) -> dict[str, float]:
        """ "right": the answer contains the name."""
        return {"right": float(metrics.contains_all(answer, example.references))}


def _of_other_kinds(asked: Fact, facts: Sequence[Fact], count: int, rng: random.Random) -> list[Fact]:
    """Facts of different kinds, none of them that of the asked fact."""
    kinds = sorted({fact.kind for fact in facts} - {asked.kind})
    return [rng.choice([fact for fact in facts if fact.kind == kind]) for kind in rng.sample(kinds, count)]


def _places(hay: str, count: int, depth: float, rng: random.Random) -> list[haystack.Place]:
    """A place for the asked fact, of a random kind and the nearest to its depth, and random ones for the others.

    An offset is used twice only if no other is free.
    """
    kinds = haystack.places(hay)
    near = kinds[rng.choice(list(kinds))]
    taken = [min(near, key=lambda place: abs(place.offset - depth * len(hay)))]
    for _ in range(count - 1):
        places, used = kinds[rng.choice(list(kinds))], {place.offset for place in taken}
        taken.append(rng.choice([place for place in places if place.offset not in used] or places))
    return taken
