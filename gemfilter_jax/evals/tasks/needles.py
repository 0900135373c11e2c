"""Needle in a haystack: one sentence hidden in essays, asked for at the end (Kamradt 2023)."""

import dataclasses
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from gemfilter_jax.evals import haystack
from gemfilter_jax.evals.examples import Case


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


def cases(
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    needles: Sequence[Needle] = NEEDLES,
    depths: Sequence[float] = DEPTHS,
) -> Iterator[Case]:
    """One case for each needle and depth, in about `tokens` tokens of essays; each needle has an order of its own."""
    for seed, needle in enumerate(needles):
        hay = haystack.pile(tokenizer, haystack.built_in("essays"), tokens, seed).first(tokens)
        for depth in depths:
            paragraph = hay.rfind("\n\n", 0, int(depth * len(hay)) + 1)
            place = paragraph + 2 if paragraph >= 0 else 0
            yield Case(
                name=f"{needle.answer} at {depth}",
                text=f"{hay[:place]}{needle.sentence}\n\n{hay[place:]}",
                question=needle.question,
                answers=(needle.answer,),
                spans=((place, place + len(needle.sentence)),),
                tokens=tokens,
            )
