"""Needle in a haystack: one sentence hidden in essays, asked for at the end (Kamradt 2023)."""

import dataclasses
import functools
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals import haystack, jsonl, metrics
from gemfilter_jax.evals.example import Example
from gemfilter_jax.evals.task import Task
from gemfilter_jax.settings import option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NEW_TOKENS = 24
_CHARACTERS_PER_NEW_TOKEN = 2  # leaves room for words around the answer
_LONGEST_NAME = 40


@dataclasses.dataclass(frozen=True)
class Needle:
    """A hidden sentence, the question that asks for it, and the word or words that a right answer contains."""

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

PAPER_NEEDLE = Needle(
    sentence="The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.",
    question="What is the best thing to do in San Francisco?",
    answer="eat a sandwich and sit in Dolores Park on a sunny day.",
)
PAPER_FORMAT = (
    "This is a very long story book: <book> {text} </book>.\n "
    "Based on the content of the book, Question: {question}\nAnswer:"
)
_PAPER_KEY_WORDS = ("sandwich", "Dolores Park")
_PAPER_DEPTHS = 10
_PAPER_NEW_TOKENS = 50


@dataclasses.dataclass(frozen=True)
class Needles(Task):
    """Sentences, each hidden at several depths of a long text; an answer is right if it contains the key word of the
    sentence it is asked for.

    With `paper`, needle, question, prompt, depths and length of the answer are those of GemFilter's needle test
    (https://github.com/SalesforceAIResearch/GemFilter, eval/needle/needle_in_haystack.py), and the needle follows the
    last full stop before its depth. That test takes its essays in the order of their files and makes texts 200 tokens
    shorter than asked; here paragraphs are shuffled and the needle comes on top of the tokens asked for.

    Raises:
      UserError: an option is out of bounds, a file or folder cannot be used, or `paper` is given with other needles.

    Attributes:
      needles: the sentences; each is hidden in the paragraphs in a different order. None for those of `needles_file`,
        or of this module.
      depths: relative positions of each sentence: 0 at the start of the text, 1 at its end. None for `depth_count`.
    """

    name: ClassVar[str] = "needles"
    title: ClassVar[str] = "Needles in a haystack"
    parts: ClassVar[str] = "depth"
    needles: tuple[Needle, ...] | None = None
    depths: tuple[float, ...] | None = None
    depth_count: int = option(
        0,
        "Depths of each sentence, evenly from the text's start to its end; 0 for 0.1, 0.5 and 0.9.",
        at_least=0,
        at_most=101,
    )
    needles_file: str | None = option(
        None, "Hide the sentences of this JSONL file; each line has the fields needle, question and answer."
    )
    texts: str | None = option(None, "Hide sentences in the .txt and .md files of this folder.")
    paper: bool = option(False, "Ask as the paper's needle test does: its needle, prompt and, by default, ten depths.")

    def __post_init__(self):
        super().__post_init__()
        if self.paper and (self.needles_file is not None or self.needles is not None):
            other = "needles" if self.needles_file is None else "needles_file"
            raise UserError(f"paper has a needle of its own, but {other} is given; give one of the two")
        _ = self._needles, self._paragraphs  # so that an unusable file is reported before a model is loaded

    @functools.cached_property
    def _needles(self) -> tuple[Needle, ...]:
        if self.paper:
            return (PAPER_NEEDLE,)
        if self.needles is not None:
            return self.needles
        if self.needles_file is None:
            return NEEDLES
        lines = jsonl.read(self.needles_file, "a needle")
        return tuple(Needle(line.text("needle"), line.text("question"), line.text("answer")) for line in lines)

    @functools.cached_property
    def _paragraphs(self) -> tuple[str, ...]:
        return haystack.of_folder_or_essays(self.texts)

    @property
    def _depths(self) -> tuple[float, ...]:
        """The depths; those of `depth_count` are whole hundredths, as in the published test."""
        count = self.depth_count or (_PAPER_DEPTHS if self.paper else 0)
        if self.depths is not None:
            return self.depths
        return tuple(round(100 * index / max(1, count - 1)) / 100 for index in range(count)) or DEPTHS

    def examples(self, tokenizer: "PreTrainedTokenizerBase", tokens: int) -> Iterator[Example]:
        """One example for each needle and depth, in about `tokens` tokens of text; the needle comes on top.

        In short texts several depths mean the same place. It is asked for once, by the first of them; the published
        test asks it again.
        """
        for seed, needle in enumerate(self._needles):
            hay = haystack.pile(tokenizer, self._paragraphs, tokens, seed).first(tokens)
            places: dict[tuple[str, str], float] = {}
            for depth in self._depths:
                places.setdefault(self._around(hay, depth), depth)
            for (before, after), depth in places.items():
                yield Example(
                    name=f"{textwrap.shorten(needle.answer, _LONGEST_NAME, placeholder='...')} at {depth}",
                    text=f"{before}{needle.sentence}{after}",
                    question=needle.question,
                    references=(needle.answer,),
                    spans=((len(before), len(before) + len(needle.sentence)),),
                    tokens=tokens,
                    group=f"{100 * depth:.0f} %",
                    message_format=PAPER_FORMAT if self.paper else None,
                    plain=self.paper,
                )

    def _around(self, hay: str, depth: float) -> tuple[str, str]:
        """The text before and after a needle, white space included.

        At depth 1 the needle comes last. Otherwise it comes before the paragraph at its depth or, in the paper's test,
        after the last full stop before its depth.
        """
        if self.paper:
            place = len(hay) if depth == 1 else hay.rfind(".", 0, int(depth * len(hay))) + 1
            return f"{hay[:place]}\n", f"\n{hay[place:]}"
        if depth == 1:
            return f"{hay}\n\n", ""
        paragraph = hay.rfind("\n\n", 0, int(depth * len(hay)) + 1)
        place = paragraph + 2 if paragraph >= 0 else 0
        return hay[:place], f"\n\n{hay[place:]}"

    def new_tokens(self, example: Example) -> int:
        """50 tokens in the paper's test; otherwise 24, or half as many as a longer answer has characters."""
        if self.paper:
            return _PAPER_NEW_TOKENS
        return max(_NEW_TOKENS, len(example.references[0]) // _CHARACTERS_PER_NEW_TOKEN)

    def score(self, example: Example, answer: str) -> dict[str, float]:
        """ "right": the answer contains the key words, and "recall": the share of the expected words that it contains.

        In the paper's test the key words are "sandwich" and "Dolores Park", and recall is `metrics.word_recall`; the
        published plots (eval/needle/visualize.py) show it.
        Otherwise the needle's answer is the key word, and recall ignores punctuation and articles too.
        """
        (expected,) = example.references
        right = metrics.contains_all(answer, _PAPER_KEY_WORDS if self.paper else example.references)
        if not self.paper and metrics.normalised(expected):
            answer, expected = metrics.normalised(answer), metrics.normalised(expected)
        return {"right": float(right), "recall": metrics.word_recall(answer, expected)}
