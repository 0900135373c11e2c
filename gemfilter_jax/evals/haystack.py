"""Long texts to hide facts in: shuffled paragraphs, cut to a number of tokens, and places for facts in them."""

import dataclasses
import importlib.resources
import pathlib
import random
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals.example import token_count

if TYPE_CHECKING:  # commands check a folder of texts before they import the rest
    from transformers import PreTrainedTokenizerBase

_LEAST_CHARACTERS = 4_000
_CHARACTERS_PER_TOKEN = 5  # a first guess
_SUFFIXES = (".md", ".txt")
_SENTENCE_END = re.compile(r"""(?<!\b[A-Z])(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)[.!?]["'”’)]*(?= ["'“‘(]?[A-Z])""")
_PARAGRAPH_BREAK = "\n\n"


def built_in(name: str) -> tuple[str, ...]:
    """The paragraphs of a text that comes with the package: "essays" or "journal".

    Both texts were written for this purpose and contain no facts like the hidden ones.
    """
    text = importlib.resources.files("gemfilter_jax.evals.data").joinpath(f"{name}.txt").read_text("utf-8")
    return tuple(text.strip().split("\n\n"))


def read_folder(folder: pathlib.Path) -> tuple[str, ...]:
    """The paragraphs of all .txt and .md files in and below a folder, by path, each paragraph on one line.

    Raises:
      UserError: the folder does not exist, a file is not UTF-8, or the files hold less than 4,000 characters.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder; give one with .txt or .md files")
    files = sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES and path.is_file())
    paragraphs: list[str] = []
    for path in files:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error
        blocks = "\n".join(line.strip() for line in lines).split("\n\n")
        paragraphs += [" ".join(block.split()) for block in blocks if block.strip()]
    characters = sum(map(len, paragraphs))
    if characters < _LEAST_CHARACTERS:
        raise UserError(
            f"{folder}: its {len(files)} .txt and .md files hold {characters:,} characters of text; "
            f"at least {_LEAST_CHARACTERS:,} are needed"
        )
    return tuple(paragraphs)


def of_folder_or_essays(folder: str | None) -> tuple[str, ...]:
    """The paragraphs of a folder's files, or the built-in essays if None; see `read_folder`."""
    return built_in("essays") if folder is None else read_folder(pathlib.Path(folder))


@dataclasses.dataclass(frozen=True)
class Haystack:
    """A long text and the ends of its tokens.

    Attributes:
      text: paragraphs separated by blank lines.
      ends: character offset at which each token ends.
    """

    text: str
    ends: tuple[int, ...]

    def first(self, tokens: int) -> str:
        """The text of the first `tokens` tokens, at least one."""
        return self.text[: self.ends[tokens - 1]]


def pile(tokenizer: "PreTrainedTokenizerBase", paragraphs: Sequence[str], tokens: int, seed: int) -> Haystack:
    """A haystack of more than `tokens` tokens; the paragraphs repeat, in a new random order each time.

    The same seed gives the same text, and a shorter text is the beginning of a longer one.
    """
    endless, text = _shuffled(paragraphs, seed), ""
    while True:
        wanted = max(_CHARACTERS_PER_TOKEN * (tokens + 1), 2 * len(text))
        pieces, written = [text], len(text)
        while written < wanted:
            pieces.append(f"{next(endless)}\n\n")
            written += len(pieces[-1])
        text = "".join(pieces)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = tuple(end for _, end in encoded["offset_mapping"])
        if len(ends) > tokens:
            return Haystack(text, ends)


def _shuffled(paragraphs: Sequence[str], seed: int) -> Iterator[str]:
    order = random.Random(seed)
    while True:
        yield from order.sample(paragraphs, len(paragraphs))


def tokens_besides(tokenizer: "PreTrainedTokenizerBase", facts: Sequence[str], tokens: int) -> int:
    """How many of a text's `tokens` tokens are left beside its facts.

    Raises:
      UserError: none is left.
    """
    added = token_count(tokenizer, _PARAGRAPH_BREAK.join(facts))
    if added >= tokens:
        raise UserError(f"{len(facts)} facts take {added} tokens, the text is to have {tokens}; ask for a longer one")
    return tokens - added


@dataclasses.dataclass(frozen=True, order=True)
class Place:
    """A place for a fact; places sort by offset, then by `rank`, so that one at a paragraph's end precedes the next.

    Attributes:
      offset: character offset at which the fact is inserted.
      before, after: white space that separates the fact from the text.
    """

    offset: int
    rank: int
    before: str
    after: str


def places(text: str) -> dict[str, list[Place]]:
    """Places for facts by kind: as a paragraph, at a paragraph's start or end, or between two of its sentences.

    Kinds without a place are left out.
    """
    breaks = [match.start() for match in re.finditer(_PARAGRAPH_BREAK, text)]
    starts = [0, *(offset + len(_PARAGRAPH_BREAK) for offset in breaks)]
    kinds = {
        "paragraph": [Place(0, 1, "", _PARAGRAPH_BREAK), *(Place(end, 1, _PARAGRAPH_BREAK, "") for end in breaks)],
        "start": [Place(start, 2, "", " ") for start in starts],
        "end": [Place(end, 0, " ", "") for end in breaks],
        "inside": [Place(match.end(), 0, " ", "") for match in _SENTENCE_END.finditer(text)],
    }
    return {kind: found for kind, found in kinds.items() if found}


def insert(text: str, facts: Sequence[str], taken: Sequence[Place]) -> tuple[str, list[tuple[int, int]]]:
    """The text with each fact at its place, and the spans of the facts as character offsets [start, end)."""
    pieces, length, read = [], 0, 0
    spans = [(0, 0)] * len(facts)
    for index in sorted(range(len(facts)), key=taken.__getitem__):
        place = taken[index]
        pieces += [text[read : place.offset], place.before, facts[index], place.after]
        start = length + len(pieces[-4]) + len(place.before)
        spans[index] = (start, start + len(facts[index]))
        length, read = spans[index][1] + len(place.after), place.offset
    return "".join([*pieces, text[read:]]), spans
