"""Runs methods over the examples of a task."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeGuard

from gemfilter_jax.evals.task import Example, Task
from gemfilter_jax.methods.gemfilter.method import GemFilter, Method
from gemfilter_jax.pipeline import Pipeline, Result

WHOLE = 0.9
"""A span counts as kept if at least this share of its characters is; a missing full stop costs no answer."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The answer to an example, and its scores.

    Attributes:
      answer: the model's text.
      scores: the task's scores of the answer; if the example has spans also "kept", the share of their characters
        that was kept, and "facts_kept", the share of the spans that were kept whole, or nearly (`WHOLE`).
      timings: seconds per stage; see `Result`.
    """

    example: Example
    answer: str
    scores: Mapping[str, float]
    timings: Mapping[str, float]


def run(
    model: Pipeline, task: Task, methods: Mapping[str, Method], examples: Iterable[Example]
) -> Iterator[tuple[str, Outcome]]:
    """Ask every example by every method, and yield each method's name with the outcome.

    A text with several questions is read once for all of them by the methods that can. Its examples must follow each
    other.
    """
    for text, same_text in itertools.groupby(examples, key=lambda example: example.text):
        group, documents = list(same_text), {}
        if len(group) > 1:
            shared = {name: method for name, method in methods.items() if reads_documents(method)}
            documents = {name: model.document(text, method=method) for name, method in shared.items()}
        for example in group:
            limit = task.new_tokens(example)
            for name, method in methods.items():
                if name in documents:
                    result = documents[name].ask(example.question, max_new_tokens=limit)
                else:
                    result = model.generate(text, example.question, method=method, max_new_tokens=limit)
                yield name, _outcome(task, example, result)


def reads_documents(method: Method) -> TypeGuard[GemFilter]:
    """Whether the method can read a text once for several questions."""
    return isinstance(method, GemFilter)


def kept_tokens(method: Method) -> int | None:
    """How many tokens the method keeps; None if all."""
    return method.keep if isinstance(method, GemFilter) else None


def _outcome(task: Task, example: Example, result: Result) -> Outcome:
    scores = {**task.score(example, result.text), **_kept(example, result)}
    return Outcome(example, result.text, scores, result.timings)


def _kept(example: Example, result: Result) -> dict[str, float]:
    """What was kept of an example's spans, if it has any."""
    if not example.spans:
        return {}
    lengths = [end - start for start, end in example.spans]
    covered = [
        sum(max(0, min(end, last) - max(start, first)) for first, last in result.selection.spans)
        for start, end in example.spans
    ]
    whole = [kept >= WHOLE * length for kept, length in zip(covered, lengths, strict=True)]
    return {"kept": sum(covered) / sum(lengths), "facts_kept": sum(whole) / len(whole)}
