"""Where the passages of a document end: sentences, list items, rows, turns of a dialogue, pieces of code.

No format is asked for. Blank lines part blocks. Whether a line break within a block ends something or only wraps prose
is told from the lines. A heading belongs to what follows it, and a piece of a few letters to its neighbour. Everything
is linear in the length of the text.
"""

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

_FEW_WORDS, _FEW_LETTERS = 3, 12  # a piece of fewer words and fewer letters does not stand alone
_HEADING_WORDS = 14  # a heading has no more
_LEADING = 200  # characters, about, of headings and small pieces that are put before another piece
_NARROWEST, _WIDEST = 40, 120  # columns of a line, where prose is wrapped
_CODE = 240  # characters, about, of a piece of code

_HAN_LETTERS = "々〇぀-ヿ㐀-鿿"  # and kana; each is a word
_HAN = re.compile(f"[{_HAN_LETTERS}]")
_WORD = re.compile(rf"[{_HAN_LETTERS}]|[^\W_{_HAN_LETTERS}]+")
_BETWEEN = rf"[^\w{_HAN_LETTERS}]*(?:_[^\w{_HAN_LETTERS}]*)*"  # what is neither
_ONE_WORD = rf"(?:{_BETWEEN}(?:[{_HAN_LETTERS}]|[^\W_{_HAN_LETTERS}]++))"
_ONE_LETTER = rf"(?:{_BETWEEN}(?:[{_HAN_LETTERS}]|[^\W_{_HAN_LETTERS}]))"
_NOT_SMALL = re.compile(rf"{_ONE_WORD}{{{_FEW_WORDS}}}|{_ONE_LETTER}{{{_FEW_LETTERS}}}")
_NO_HEADING = re.compile(rf"{_ONE_WORD}{{{_HEADING_WORDS + 1}}}")
_SENTENCE_END = re.compile(r"""[.!?…]["'”’»)\]]*(?=\s)|[。！？।؟۔]["”’」』）]*""")
# Words with a full stop that ends no sentence: initials and abbreviations, and numbers of headings and items.
_NO_END = re.compile(
    r"""(?:^|["'“‘(\[])(?:(?:[^\W\d_]\.)*[^\W\d_]|al|approx|apr|aug|ca|capt|cf|ch|dec|dept|dr|eds?|eq|etc|feb|figs?|gen"""
    r"""|gov|inc|jan|jr|jul|jun|lt|ltd|mr|mrs|ms|mt|nov|oct|pp?|para|prof|rev|sect?|sen|sept?|sgt|sr|st|vols?|vs)\.$""",
    re.IGNORECASE,
)
_NO = re.compile(r"\bnos?\.$", re.IGNORECASE)  # before a number
_ITEM_NUMBER = re.compile(r"\(?\d{1,3}(?:\.\d{1,3}){0,3}\.$")  # at a beginning, after a mark or after one of
_AND_OR = re.compile(r"\b(?:and|or)$", re.IGNORECASE)
_NUMBER = re.compile(r"""\s*["'“‘(\[]*(?:[\w-]{0,12}\d|[IVXLCDM]{2,8}\b)""")
_NEXT = re.compile(r"""\s*["'“‘(\[]*(\w)""")
_REACH = 16  # characters before a full stop that are looked at
_ITEM = re.compile(
    r"\s*(?:[-*+•‣▪◦·–—]\s|\(?(?:\d{1,3}|[a-zA-Z]|[ivxIVX]{1,5})[.)]\s|#{1,6}\s|\|"
    r"|(?:[A-Z][\w .'/()-]{0,30}|[\w.-]{1,30}):\s)"
)
"""The beginning of a list item, a heading, a row, a turn of a dialogue, a key with its value."""

# Of lines without white space at their ends:
_CODE_START = re.compile(
    r"\s*(?:(?:def|class|if|for|while|elif|else|try|func|fn|let|const|var|public|private|static)\b.*:$"
    r"|(?:import|from|return|using|package)\s|[#@]\w|//|/\*|\*/|[)\]}]+[;,]?$|[\w.\[\]\"']+\s*[-+*/:]?=\s*\S)"
)
_CODE_END = re.compile(r".?[{};(\[]$|[\])}\"\w'],$")
_CLOSER = re.compile(r"\s*[)\]}]+[;,]?$")
_DELIMITERS = ("\t", ";", "|", ",")


def passage_ends(text: str) -> np.ndarray:
    """int64 [n], increasing: the characters at which the passages of a text end; the last is the length of the text."""
    ends: list[int] = []
    last = begun = 0  # where the last passage and the one at hand begin
    for lines, starts in _blocks(text):
        code = _is_code(lines)
        for start, end in _pieces_of_code(lines, starts) if code else _pieces_of_prose(text, lines, starts):
            first = start == starts[0]
            if ends and not first and begun == start:
                small_line = end - last < _LEADING and text[start - 1] == "\n" and _is_small(text, start, end)
                if small_line or not _WORD.search(text, start, end):
                    ends[-1] = begun = end
                    continue
            if end - begun < _LEADING:
                heads = first and not code and end == starts[1] and _is_heading(lines)
                if heads or _is_small(text, begun, end):
                    continue
            ends.append(end)
            last, begun = begun, end
    if begun < len(text):
        ends[-1:] = [len(text)]
    return np.asarray(ends, np.int64)


def _blocks(text: str) -> Iterator[tuple[list[str], list[int]]]:
    """Runs of n lines without blank lines between them.

    Yields:
      The lines, without white space at their ends, and the characters [n + 1] at which they and the next block begin.
      Blank lines belong to the line before them.
    """
    lines: list[str] = []
    starts: list[int] = []
    at, blank = 0, False
    for whole in text.split("\n"):
        line = whole.rstrip()
        if line:
            if blank and lines:
                starts.append(at)
                yield lines, starts
                lines, starts = [], []
            lines.append(line)
            starts.append(at)
        blank = not line
        at += len(whole) + 1
    if lines:
        starts.append(len(text))
        yield lines, starts


def _is_code(lines: Sequence[str]) -> bool:
    return 1 < len(lines) < 2 * sum(map(_is_line_of_code, lines))


def _is_line_of_code(line: str) -> bool:
    return bool((line[-1] in "{};([," and _CODE_END.match(line[-2:])) or _CODE_START.match(line))


def _pieces_of_code(lines: Sequence[str], starts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Lines of about `_CODE` characters, cut where the indentation goes back, if it does."""
    begun = starts[0]
    indentation = 0
    for line, start, end in zip(lines, starts, starts[1:], strict=False):
        if _CLOSER.match(line):
            continue
        own = len(line) - len(line.lstrip())
        if start > begun and (end - begun > _CODE or (own < indentation and start - begun >= _CODE // 3)):
            yield begun, start
            begun = start
        indentation = own
    yield begun, starts[-1]


def _pieces_of_prose(text: str, lines: Sequence[str], starts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Sentences, within lines or groups of lines that are wrapped."""
    for first, after in itertools.pairwise([0, *_cuts(lines), len(lines)]):
        yield from _sentences(text, starts[first], starts[after - 1] + len(lines[after - 1]), starts[after])


def _cuts(lines: Sequence[str]) -> Sequence[int]:
    """The lines of a block, but the first, before which a line break does more than wrap prose."""
    every = range(1, len(lines))
    if not every or max(map(len, lines)) > _WIDEST:
        return every
    columns = [_columns(line) for line in lines]
    width = max(columns)
    small = [_begins_small(line) for line in lines]
    if width > _WIDEST or (len(lines) > 3 and (4 * sum(small) < len(lines) or _is_table(lines))):
        return every

    def ends_something(index: int) -> bool:
        line = lines[index].lstrip()
        if _ITEM.match(line):
            return True
        han = _HAN.match(line)
        if small[index] and not han:
            return False
        # a Chinese character takes two columns, and a comma, which begins no line, two more
        needed = 4 if han else 1 + _columns(line.split(maxsplit=1)[0])
        return width < _NARROWEST or columns[index - 1] + needed <= width

    return [index for index in every if ends_something(index)]


def _columns(line: str) -> int:
    """The width of a line in a terminal, where characters of East Asia take two columns."""
    return len(line) + (not line.isascii() and sum(map(_is_wide, line)))


@functools.lru_cache(maxsize=1 << 16)
def _is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"


def _begins_small(line: str) -> bool:
    """Whether a line begins as the middle of a sentence does; a letter without case may."""
    first = line.lstrip()[0]
    return first.isalpha() and not first.isupper()


def _is_table(lines: Sequence[str]) -> bool:
    """Whether all lines have two or more of the same delimiter, the same number of it each."""
    counts = [(one, lines[0].count(one)) for one in _DELIMITERS]
    return any(count > 1 and all(line.count(one) == count for line in lines) for one, count in counts)


def _sentences(text: str, start: int, last: int, end: int) -> Iterator[tuple[int, int]]:
    """Pieces of the characters from `start` to `end`, of which those from `last` on are white space."""
    for match in _SENTENCE_END.finditer(text, start, last):
        stop, after = match.span()
        if after == last:
            break
        following = _NEXT.match(text, after, end)
        if following is not None and following[1].islower():
            continue
        if text[stop] == "." and stop > start and text[stop - 1].isalnum():
            *before, word = text[max(start, stop + 1 - _REACH) : stop + 1].rsplit(maxsplit=1)
            if word[-2].isdecimal():
                begins = not before or before[0][-1] in ":;,." or _AND_OR.search(before[0])
                if begins and _ITEM_NUMBER.match(word):
                    continue
            elif _NO_END.search(word) or (_NO.search(word) and _NUMBER.match(text, after, end)):
                continue
        yield start, after
        start = after
    yield start, end


def _is_small(text: str, start: int, end: int) -> bool:
    return not _NOT_SMALL.match(text, start, end)


def _is_heading(lines: Sequence[str]) -> bool:
    """Whether a block's first line is one of a few words that does not end as a sentence."""
    line = lines[0]
    if line[-1] in ".!…。;," and not line.lstrip().startswith("#"):
        return False
    if len(lines) > 1 and _ITEM.match(line) and _ITEM.match(lines[1]):
        return False
    return not _NO_HEADING.match(line)
