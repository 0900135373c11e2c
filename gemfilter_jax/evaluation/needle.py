"""Needle in a haystack: one sentence hidden in a long text, asked for at the end (Kamradt 2023).

The haystack is 120 paragraphs of essays (essays.txt, written for this purpose, without any fact like the needles'),
shuffled anew each time they are gone through.
"""

import dataclasses
import importlib.resources
import random
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from gemfilter_jax.methods import Method
from gemfilter_jax.pipeline import Pipeline


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
class Case:
    """A haystack with a needle in it. `span` is where the needle's characters are in `text`."""

    text: str
    span: tuple[int, int]
    needle: Needle
    depth: float
    tokens: int


def haystack(characters: int, seed: int) -> str:
    """At least `characters` of essays, whole paragraphs, the same for the same seed."""
    essays = importlib.resources.files("gemfilter_jax.evaluation").joinpath("essays.txt").read_text("utf-8")
    paragraphs = essays.strip().split("\n\n")
    order = random.Random(seed)
    text = ""
    while len(text) < characters:
        text += "\n\n".join(order.sample(paragraphs, len(paragraphs))) + "\n\n"
    return text


def cases(
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    needles: Sequence[Needle] = NEEDLES,
    depths: Sequence[float] = DEPTHS,
) -> Iterator[Case]:
    """One case for each needle and depth, in about `tokens` tokens of essays; each needle has an order of its own."""
    for seed, needle in enumerate(needles):
        text = haystack(characters=8 * tokens, seed=seed)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        hay = text[: encoded["offset_mapping"][tokens - 1][1]]
        for depth in depths:
            place = hay.rfind("\n\n", 0, int(depth * len(hay)) + 1) + 2
            yield Case(
                text=f"{hay[:place]}{needle.sentence}\n\n{hay[place:]}",
                span=(place, place + len(needle.sentence)),
                needle=needle,
                depth=depth,
                tokens=tokens,
            )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one case: was the answer right, and the share of the needle's characters that was kept."""

    case: Case
    answer: str
    right: bool
    kept: float


def ask(model: Pipeline, case: Case, method: Method, max_new_tokens: int = 24) -> Outcome:
    """Ask for a case's needle; right means that the answer contains the needle's key word, in either case."""
    result = model.generate(case.text, case.needle.question, method=method, max_new_tokens=max_new_tokens)
    start, end = case.span
    covered = sum(max(0, min(end, last) - max(start, first)) for first, last in result.selection.spans)
    return Outcome(case, result.text, case.needle.answer.lower() in result.text.lower(), covered / (end - start))
