"""Where the passages of a document end: sentences, list items, rows, turns of a dialogue, pieces of code.

No format is asked for. Blank lines part blocks. Whether a line break within a block ends something or only wraps prose
is told from the lines. A heading belongs to what follows it, and a piece of a few letters to its neighbour. Everything
is linear in the length of the text.
"""

import dataclasses
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence

import numpy as np

_FEW_WORDS, _FEW_LETTERS = 3, 12  # a piece of fewer words and fewer letters does not stand alone
_HEADING_WORDS = 14  # a heading has no more
_LEADING = 200  # characters, about, of headings and small pieces that are put before another piece
_NARROWEST, _WIDEST = 40, 120  # columns of a line, where prose is wrapped
_CODE = 240  # characters, about, of a piece of code

_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_HAN_LETTERS = "々〇぀-ヿ㐀-鿿"  # and kana; each is a word
_HAN = re.compile(f"[{_HAN_LETTERS}]")
_WORD = re.compile(rf"[{_HAN_LETTERS}]|[^\W_{_HAN_LETTERS}]+")
_SENTENCE_END = re.compile(r"""[.!?…]["'”’»)\]]*(?=\s)|[。！？।؟۔]["”’」』）]*""")
_NO_END = re.compile(
    r"""(?:^|[\s("'“‘\[])(?:(?:[^\W\d_]\.)*[^\W\d_]|al|approx|apr|aug|ca|capt|cf|ch|dec|dept|dr|eds?|eq|etc|feb|figs?|gen"""
    r"""|gov|inc|jan|jr|jul|jun|lt|ltd|mr|mrs|ms|mt|nov|oct|pp?|para|prof|rev|sect?|sen|sept?|sgt|sr|st|vols?|vs)\.$"""
    r"""|(?:^|[:;,.]\s|\b(?:and|or)\s)\s*\(?\d{1,3}(?:\.\d{1,3}){0,3}\.$""",
    re.IGNORECASE,
)
"""What ends with a full stop and is no end of a sentence: initials, abbreviations, numbers of headings and items."""

_NO = re.compile(r"\bnos?\.$", re.IGNORECASE)  # no end of a sentence if a number follows
_NUMBER = re.compile(r"""\s*["'“‘(\[]*(?:[\w-]{0,12}\d|[IVXLCDM]{2,8}\b)""")
_NEXT = re.compile(r"""\s*["'“‘(\[]*(\w)""")
_REACH = 16  # characters before a full stop that `_NO_END` looks at
_ITEM = re.compile(
    r"\s*(?:[-*+•‣▪◦·–—]\s|\(?(?:\d{1,3}|[a-zA-Z]|[ivxIVX]{1,5})[.)]\s|#{1,6}\s|\|"
    r"|(?:[A-Z][\w .'/()-]{0,30}|[\w.-]{1,30}):\s)"
)
"""The beginning of a list item, a heading, a row, a turn of a dialogue, a key with its value."""

_CODE_LINE = re.compile(
    r"\s*(?:(?:def|class|if|for|while|elif|else|try|func|fn|let|const|var|public|private|static)\b.*[:;{(]\s*$"
    r"|(?:import|from|return|using|package)\s|[#@]\w|//|/\*|\*/|[)\]}]+[;,]?\s*$|[\w.\[\]\"']+\s*[-+*/:]?=\s*\S)"
    r"|.*[{};(\[]\s*$|.*[\])}\"\w'],\s*$"
)
_CLOSER = re.compile(r"\s*[)\]}]+[;,]?\s*$")
_DELIMITERS = ("\t", ";", "|", ",")


@dataclasses.dataclass
class _Block:
    """Lines of a text without blank lines between them.

    Attributes:
      lines: the lines, without white space at their ends.
      starts, ends: the characters at which each begins and ends; blank lines belong to the line before them.
    """

    lines: list[str] = dataclasses.field(default_factory=list)
    starts: list[int] = dataclasses.field(default_factory=list)
    ends: list[int] = dataclasses.field(default_factory=list)


def passage_ends(text: str) -> np.ndarray:
    """int64 [n], increasing: the characters at which the passages of a text end; the last is the length of the text."""
    ends: list[int] = []
    last = begun = 0  # where the last passage and the one at hand begin
    for block in _blocks(text):
        code = _is_code(block)
        for start, end in _pieces_of_code(block) if code else _pieces_of_prose(text, block):
            first = start == block.starts[0]
            wordless = not _WORD.search(text, start, end)
            small_line = text[start - 1 : start] == "\n" and _is_small(text, start, end)
            if ends and not first and begun == start and (wordless or (small_line and end - last < _LEADING)):
                ends[-1] = begun = end
                continue
            heads = first and not code and _is_heading(text, start, end, block)
            if (heads or _is_small(text, begun, end)) and end - begun < _LEADING:
                continue
            ends.append(end)
            last, begun = begun, end
    if begun < len(text):
        ends[-1:] = [len(text)]
    return np.asarray(ends, np.int64)


def _blocks(text: str) -> Iterator[_Block]:
    block, blank = _Block(), False
    for match in _LINE.finditer(text):
        line = match[0].rstrip()
        if not line:
            blank = True
            block.ends[-1:] = [match.end()] if block.ends else []
            continue
        if blank and block.lines:
            yield block
            block = _Block()
        block.lines.append(line)
        block.starts.append(match.start())
        block.ends.append(match.end())
        blank = False
    if block.lines:
        yield block


def _is_code(block: _Block) -> bool:
    return 1 < len(block.lines) < 2 * sum(bool(_CODE_LINE.match(line)) for line in block.lines)


def _pieces_of_code(block: _Block) -> Iterator[tuple[int, int]]:
    """Lines of about `_CODE` characters, cut where the indentation goes back, if it does."""
    begun = indentation = 0
    for index, line in enumerate(block.lines):
        if _CLOSER.match(line):
            continue
        back = _indentation(line) < indentation and block.starts[index] - block.starts[begun] >= _CODE // 3
        if index > begun and (back or block.ends[index] - block.starts[begun] > _CODE):
            yield block.starts[begun], block.starts[index]
            begun = index
        indentation = _indentation(line)
    yield block.starts[begun], block.ends[-1]


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def _pieces_of_prose(text: str, block: _Block) -> Iterator[tuple[int, int]]:
    """Sentences, within lines or groups of lines that are wrapped."""
    ends_something = _ends_something(block)
    cuts = [index for index in range(1, len(block.lines)) if ends_something(index)]
    for first, after in itertools.pairwise([0, *cuts, len(block.lines)]):
        yield from _sentences(text, block.starts[first], block.ends[after - 1])


def _ends_something(block: _Block) -> Callable[[int], bool]:
    """Whether the line break before line i of a block does more than wrap prose."""
    lines = block.lines
    width = max(map(_columns, lines))
    small = sum(map(_begins_small, lines))
    rows = len(lines) > 3 and (4 * small < len(lines) or _is_table(lines))

    def ends(index: int) -> bool:
        before, line = lines[index - 1], lines[index].lstrip()
        if rows or width > _WIDEST or _ITEM.match(line):
            return True
        han = _HAN.match(line)  # two columns, and two for a comma, which begins no line
        needed = 4 if han else 1 + _columns(line.split(maxsplit=1)[0])
        wrapped = width >= _NARROWEST and _columns(before) + needed > width
        return not (wrapped or (not han and _begins_small(line)))

    return ends


def _columns(line: str) -> int:
    """The width of a line in a terminal, where characters of East Asia take two columns."""
    return len(line) + (not line.isascii() and sum(unicodedata.east_asian_width(one) in "WF" for one in line))


def _begins_small(line: str) -> bool:
    """Whether a line begins as the middle of a sentence does; a letter without case may."""
    first = line.lstrip()[0]
    return first.isalpha() and not first.isupper()


def _is_table(lines: Sequence[str]) -> bool:
    """Whether all lines have two or more of the same delimiter, the same number of it each."""
    counts = (sorted({line.count(one) for line in lines}) for one in _DELIMITERS)
    return any(len(found) == 1 and found[0] > 1 for found in counts)


def _sentences(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    last = start + len(text[start:end].rstrip())
    for match in _SENTENCE_END.finditer(text, start, last):
        if match.end() == last:
            break
        following = _NEXT.match(text, match.end(), end)
        near = text[max(start, match.start() + 1 - _REACH) : match.start() + 1]
        if following is not None and following[1].islower():
            continue
        if match[0][0] == "." and (
            _NO_END.search(near) or (_NO.search(near) and _NUMBER.match(text, match.end(), end))
        ):
            continue
        yield start, match.end()
        start = match.end()
    yield start, end


def _is_small(text: str, start: int, end: int) -> bool:
    words = list(itertools.islice(_WORD.finditer(text, start, end), _FEW_WORDS))
    return len(words) < _FEW_WORDS and sum(len(word[0]) for word in words) < _FEW_LETTERS


def _is_heading(text: str, start: int, end: int, block: _Block) -> bool:
    """Whether a block's first piece is a line of a few words that does not end as a sentence."""
    if end != block.ends[0]:
        return False
    line = block.lines[0]
    if len(block.lines) > 1 and _ITEM.match(line) and _ITEM.match(block.lines[1]):
        return False
    words = list(itertools.islice(_WORD.finditer(text, start, end), _HEADING_WORDS + 1))
    return len(words) <= _HEADING_WORDS and (line.lstrip().startswith("#") or line[-1] not in ".!…。;,")
