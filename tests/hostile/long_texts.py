"""Texts that are hard for patterns and loops over characters, of any length."""

import functools
import itertools
from collections.abc import Callable


def _repeated(unit: str, length: int) -> str:
    return (unit * (length // len(unit) + 1))[:length]


def _numbered_tags(length: int) -> str:
    """Every closing tag that a prompt's format may take, as many as fit."""
    sizes, tags = 0, []
    for number in itertools.count(1):
        tags.append(f"</text-{number}>" if number > 1 else "</text>")
        sizes += len(tags[-1])
        if sizes >= length:
            return "".join(tags)[:length]
    raise AssertionError


_UNITS = {
    "letters": "a",
    "capitals": "A",
    "words": "word ",
    "sentences": "It is so. ",
    "blank lines": "\n",
    "blank lines with spaces": "    \n",
    "spaces": " ",
    "tabs": "\t",
    "opening parentheses": "(",
    "closing parentheses": ")",
    "opening brackets": "[[",
    "lines of brackets": "[]{}()\n",
    "digits": "7",
    "numbers of items": "1. ",
    "emoji": "😀",
    "combining marks": "\u0301",
    "letters with marks": "e\u0301",
    "full stops": ". ",
    "full stops without spaces": ".",
    "quotes": '"',
    "full stops and quotes": '."',
    "letters with full stops": "a.b.c.",
    "commas": ",",
    "control tokens": "<|im_end|>",
    "lines with carriage returns": "ab cd ef.\r\n",
    "Chinese": "中",
    "Chinese sentences": "今天天气很好。",
    "Chinese lines": "今天天气很好，\n",
    "lines of a letter": "a\n",
    "paragraphs of a letter": "a\n\n",
    "items": "- x\n",
    "keys": "key: value\n",
    "code": "x = 1;\n",
    "rows": "a,b,c\n",
    "rows with bars": "| a | b |\n",
    "wrapped prose": "the words of a line that is as wide as prose is wrapped for a screen or a page\n",
    "lines of 5,000 letters": "x" * 5_000 + "\n",
    "full stops before 500 spaces": " ." + " " * 500,
    "semicolons before 1,000 spaces": ";" + " " * 1_000,
}

DATA: dict[str, Callable[[int], str]] = {
    **{name: functools.partial(_repeated, unit) for name, unit in _UNITS.items()},
    "spaces before a letter": lambda length: " " * (length - 1) + "a",
    "brackets before a letter": lambda length: ")" * (length - 1) + "a",
    "marks after a letter": lambda length: "e" + "\u0301" * (length - 1),
    "two lines of letters": lambda length: "a" * (length // 2) + "\n" + "a" * (length - length // 2 - 1),
    "two lines of Chinese": lambda length: "中" * (length // 2) + "\n" + "中" * (length - length // 2 - 1),
    "two lines of brackets": lambda length: "(" * (length // 2) + "\n" + ")" * (length - length // 2 - 1),
    "two lines of colons": lambda length: "if" + ":" * (length // 2) + "\nif" + ":" * (length - length // 2 - 6) + "a",
    "numbered tags": _numbered_tags,
}
"""Name -> a function of a length, in characters, that makes a text of that length."""
