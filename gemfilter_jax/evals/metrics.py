"""Scores of an answer against references, numbers from 0 to 1."""

import collections
import re
import string
from collections.abc import Iterable

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def contains_all(answer: str, references: Iterable[str]) -> bool:
    """Whether the answer contains every reference, ignoring case."""
    return all(reference.lower() in answer.lower() for reference in references)


def share_contained(answer: str, references: Iterable[str]) -> float:
    """The share of the references that the answer contains, ignoring case (RULER's string_match_all)."""
    found = [reference.lower() in answer.lower() for reference in references]
    return sum(found) / len(found)


def word_recall(answer: str, reference: str) -> float:
    """The number of distinct words of the reference that the answer contains, divided by the reference's length.

    Words end at white space and keep their punctuation; case is ignored. The published plots of GemFilter's needle
    tests show this recall. A reference that repeats a word cannot reach 1: 11 / 12 is the most for the paper's needle.
    """
    wanted = reference.lower().split()
    return len(set(wanted) & set(answer.lower().split())) / len(wanted)


def normalised(text: str) -> str:
    """Lower case without punctuation, articles and repeated white space, as SQuAD's evaluation compares answers."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(answer: str, reference: str) -> float:
    """The F1 of the normalised words that answer and reference share (SQuAD, arXiv 1606.05250)."""
    given, wanted = normalised(answer).split(), normalised(reference).split()
    shared = sum((collections.Counter(given) & collections.Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted)) if shared else 0.0
