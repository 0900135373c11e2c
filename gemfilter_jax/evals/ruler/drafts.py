"""Parts of RULER's texts (arXiv 2404.06654): needles among sentences, random words, and texts of a length in tokens."""

import bisect
import dataclasses
import functools
import importlib.resources
import itertools
import json
import math
import random
import string
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals import haystack
from gemfilter_jax.evals.example import token_count

if TYPE_CHECKING:  # commands read the tasks' options before they import JAX
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Kind = Literal["words", "numbers", "uuids"]

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""The sentences that RULER repeats as noise."""

TOLERANCE = 0.02
"""A text's length in tokens differs from the length asked for by at most this share."""

_DEPTHS = tuple(round(100 * index / 39) for index in range(40))  # percent
_GOAL = 0.005  # a difference that ends the search for a size
_FIRST_STEP, _MOST_GROWTH = 256, 16
_INTERPOLATIONS = 8
_LONGEST_REMAINDER = 8
_TRIES = 1_000


@dataclasses.dataclass(frozen=True)
class Draft:
    """A text and the spans of its needles, as character offsets [start, end)."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()


def joined(pieces: Sequence[str], separator: str, passages: Mapping[int, str]) -> Draft:
    """The pieces as one text, with the spans of passages; each is given by the index of the piece that it ends."""
    starts = list(itertools.accumulate((len(piece) + len(separator) for piece in pieces), initial=0))
    spans = []
    for index, passage in passages.items():
        start = starts[index] + pieces[index].rindex(passage)
        spans.append((start, start + len(passage)))
    return Draft(separator.join(pieces), tuple(spans))


def hidden(sentences: Sequence[str], needles: Sequence[str], places: Sequence[int], separator: str) -> Draft:
    """The sentences with each needle before the sentence at its place, and the needles' spans.

    Args:
      places: indices of `sentences`, or their number for the end; in ascending order.
    """
    pieces, passages = list(sentences), {}
    for index, (needle, place) in enumerate(zip(needles, places, strict=True)):
        pieces.insert(place + index, needle)
        passages[place + index] = needle.rstrip()
    return joined(pieces, separator, passages)


def depths(rng: random.Random, needles: int, sentences: int) -> list[int]:
    """Random places for needles among sentences, in ascending order: at different ones of 40 evenly spaced depths."""
    return sorted(int(sentences * (depth / 100)) for depth in rng.sample(_DEPTHS, needles))


def fitted(
    tokenizer: "PreTrainedTokenizerBase",
    tokens: int,
    compose: Callable[[int], Draft],
    what: str,
    least: int = 0,
    most: int = sys.maxsize,
) -> Draft:
    """The draft of about `tokens` tokens, see `TOLERANCE`.

    The first drafts are small. Their lengths predict the size of the right one, so few drafts are of its length.

    Args:
      compose: makes the draft of a size. Its number of tokens must grow with the size, nearly in proportion.
      what: name in error messages.
      least: smallest size. most: largest size.

    Raises:
      UserError: the draft of the smallest size is too long, or no size gives the length.
    """
    size, first, low, high = least, None, None, None
    best, nearest = Draft(""), math.inf
    for step in itertools.count():
        draft = compose(size)
        found = token_count(tokenizer, draft.text)
        if abs(found - tokens) < abs(nearest - tokens):
            best, nearest = draft, found
        if found < tokens:
            low = (size, found)
            first = first or low
        else:
            high = (size, found)
        if low is None or first is None or abs(nearest - tokens) <= _GOAL * tokens or size == most:
            break
        if high is None:
            size = min(_grown(low, first, tokens), most)
        elif high[0] - low[0] > 1:
            size = _between(low, high, tokens, halve=step > _INTERPOLATIONS)
        else:
            break
    if abs(nearest - tokens) <= TOLERANCE * tokens:
        return best
    if low is None:
        raise UserError(f"{what}: the shortest text takes {nearest} tokens, expected {tokens}; ask for a longer one")
    raise UserError(f"{what}: the nearest text takes {nearest} tokens, expected {tokens}; ask for another length")


def _grown(low: tuple[int, int], first: tuple[int, int], tokens: int) -> int:
    """A size for `tokens` tokens, predicted from two smaller ones with their numbers of tokens."""
    size, found = low[0] - first[0], low[1] - first[1]
    if size == 0:
        return first[0] + _FIRST_STEP
    predicted = size * (tokens - first[1]) / max(found, 1)
    return max(low[0] + 1, first[0] + math.ceil(min(predicted, _MOST_GROWTH * size)))


def _between(low: tuple[int, int], high: tuple[int, int], tokens: int, halve: bool) -> int:
    """A size between two others, given with their numbers of tokens."""
    share = 0.5 if halve else (tokens - low[1]) / (high[1] - low[1])
    return min(max(low[0] + round(share * (high[0] - low[0])), low[0] + 1), high[0] - 1)


class Supply:
    """The beginning of an endless series of sentences, as long as asked."""

    def __init__(self, sentences: Iterator[str], separator: str):
        self._rest = sentences
        self._known: list[str] = []
        self._ends = [0]  # number of characters of so many sentences with their separators
        self._separator = separator

    def first(self, characters: int) -> list[str]:
        """The sentences of the first `characters` characters; the last one is cut, after a word if possible."""
        while self._ends[-1] <= characters:
            self._known.append(next(self._rest))
            self._ends.append(self._ends[-1] + len(self._known[-1]) + len(self._separator))
        whole = bisect.bisect_right(self._ends, characters) - 1
        last = _cut(self._known[whole], characters - self._ends[whole])
        return [*self._known[:whole], last] if last else self._known[:whole]


def _cut(sentence: str, characters: int) -> str:
    cut = sentence[:characters]
    if characters < len(sentence) and not sentence[characters].isspace():
        space = cut.rfind(" ", max(0, characters - _LONGEST_REMAINDER))
        cut = cut[:space] if space >= 0 else cut
    return cut.rstrip()


def shuffled(rng: random.Random, items: Sequence[T]) -> Iterator[T]:
    """The items in random order, again and again, in a new order each time."""
    while items:
        yield from rng.sample(items, len(items))


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph, with single spaces for white space."""
    text = " ".join(paragraph.split())
    ends = [place.offset for place in haystack.places(text).get("inside", ())]
    return [text[start:end].strip() for start, end in itertools.pairwise([0, *ends, len(text)])]


@functools.cache
def words() -> Mapping[str, tuple[str, ...]]:
    """Common English words by part of speech: "adjectives", "nouns" and "verbs"."""
    file = importlib.resources.files("gemfilter_jax.evals.data").joinpath("ruler_words.json")
    return {part: tuple(own) for part, own in json.loads(file.read_text("utf-8")).items()}


@functools.cache
def all_words() -> tuple[str, ...]:
    """The different words of `words`, in alphabetical order."""
    return tuple(sorted(set(itertools.chain.from_iterable(words().values()))))


def letters(rng: random.Random, alphabet: str, length: int) -> str:
    """A random string."""
    return "".join(rng.choices(alphabet, k=length))


class Draws:
    """Random keys and values, each drawn once, and none that occurs in a text."""

    def __init__(self, rng: random.Random, text: str = ""):
        self._rng = rng
        self._text = text
        self._drawn: set[str] = set()
        self._reserved: list[str] = []

    def draw(self, kind: Kind, reserve: bool = False) -> str:
        """A word such as "quiet-harbor", a number of seven digits, or a UUID.

        Args:
          reserve: whether later draws must not contain it.

        Raises:
          UserError: nearly all have been drawn or occur in the text.
        """
        return self.unlike(lambda: self._random(kind), reserve)

    def unlike(self, make: Callable[[], str], reserve: bool = False) -> str:
        """What `make` returns, called until that is new; arguments and errors as of `draw`."""
        for _ in range(_TRIES):
            drawn = make()
            if drawn in self._drawn or drawn.lower() in self._text:
                continue
            if any(other in drawn or drawn in other for other in self._reserved):
                continue
            self._drawn.add(drawn)
            if reserve:
                self._reserved.append(drawn)
            return drawn
        raise UserError("no random word or number is left that is not in the text already; ask for a shorter text")

    def _random(self, kind: Kind) -> str:
        if kind == "words":
            return "-".join(self._rng.choice(words()[part]) for part in ("adjectives", "nouns"))
        if kind == "numbers":
            return str(self._rng.randrange(10**6, 10**7))
        return str(uuid.UUID(int=self._rng.getrandbits(128), version=4))


def coded_words(rng: random.Random, count: int) -> list[str]:
    """Different words of six random letters, as RULER's frequent words; "..." comes first, as the noise among them."""
    draws = Draws(rng)
    return ["...", *(draws.unlike(lambda: letters(rng, string.ascii_lowercase, 6)) for _ in range(count - 1))]


def zeta_counts(size: int, vocabulary: int) -> list[int]:
    """How often RULER's frequent words occur: the word of rank k about `size` / (k² ζ(2)) times."""
    return [int(size / (rank**2 * math.pi**2 / 6)) for rank in range(1, vocabulary + 1)]


def numbered(items: Sequence[str]) -> str:
    """A numbered list on one line: "1. apple 2. pear"."""
    return " ".join(f"{index}. {item}" for index, item in enumerate(items, 1))
