"""Scores of an answer against references."""

from collections.abc import Iterable


def contains_all(answer: str, references: Iterable[str]) -> bool:
    """Whether the answer contains every reference, ignoring case."""
    return all(reference.lower() in answer.lower() for reference in references)
