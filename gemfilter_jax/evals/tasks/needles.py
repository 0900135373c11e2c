"""Needle in a haystack: one sentence hidden in essays, asked for at the end (Kamradt 2023)."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from gemfilter_jax.evals import haystack, metrics
from gemfilter_jax.evals.example import Example
from gemfilter_jax.evals.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NEW_TOKENS_PER_REFERENCE = 24


@dataclasses.dataclass(frozen=True)
class Needle:
    """A hidden sentence, the question that asks for it, and the word that a right answer contains."""

    sentence: str
    question: str
    answer: str


NEEDLES = (
    Needle(
        sentence="The password of the old lighthouse is marigold.",
        question="What is the password of the old lighthouse?",
        answer="marigold",
    ),
    Needle(
        sentence="Clara keeps her spare key under the blue flowerpot.",
        question="Where does Clara keep her spare key?",
        answer="flowerpot",
    ),
    Needle(
        sentence="The night train to Lisbon leaves from platform 47.",
        question="From which platform does the night train to Lisbon leave?",
        answer="47",
    ),
    Needle(
        sentence="Doctor Osei named her new telescope Kestrel.",
        question="What did Doctor Osei name her new telescope?",
        answer="Kestrel",
    ),
)
DEPTHS = (0.1, 0.5, 0.9)


@dataclasses.dataclass(frozen=True)
class Needles(Task):
    """Four facts, each hidden at three depths of essays; an answer is right if it contains the fact's key word.

    Attributes:
      needles: the facts; each is hidden in the essays in a different order.
      depths: relative positions of each fact: 0 at the start of the text, 1 at its end.
    """

    name: ClassVar[str] = "needles"
    title: ClassVar[str] = "Hidden facts"
    needles: tuple[Needle, ...] = NEEDLES
    depths: tuple[float, ...] = DEPTHS

    def examples(self, tokenizer: "PreTrainedTokenizerBase", tokens: int) -> Iterator[Example]:
        """One example for each needle and depth, in about `tokens` tokens of essays."""
        for seed, needle in enumerate(self.needles):
            hay = haystack.pile(tokenizer, haystack.built_in("essays"), tokens, seed).first(tokens)
            for depth in self.depths:
                paragraph = hay.rfind("\n\n", 0, int(depth * len(hay)) + 1)
                place = paragraph + 2 if paragraph >= 0 else 0
                yield Example(
                    name=f"{needle.answer} at {depth}",
                    text=f"{hay[:place]}{needle.sentence}\n\n{hay[place:]}",
                    question=needle.question,
                    references=(needle.answer,),
                    spans=((place, place + len(needle.sentence)),),
                    tokens=tokens,
                )

    def new_tokens(self, example: Example) -> int:
        """24 tokens for each reference."""
        return _NEW_TOKENS_PER_REFERENCE * len(example.references)

    def score(self, example: Example, answer: str) -> dict[str, float]:
        """ "right": the answer contains every reference."""
        return {"right": float(metrics.contains_all(answer, example.references))}
