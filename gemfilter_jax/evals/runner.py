"""Runs methods over the examples of a task."""

import itertools
from collections.abc import Iterable, Iterator, Mapping

from gemfilter_jax.evals.example import Example, Outcome
from gemfilter_jax.evals.task import Task
from gemfilter_jax.methods.base import Method
from gemfilter_jax.pipeline import Pipeline, Result

WHOLE = 0.9
"""A span counts as kept if at least this share of its characters is kept: a missing full stop does no harm."""


def run(
    model: Pipeline, task: Task, methods: Mapping[str, Method], examples: Iterable[Example]
) -> Iterator[tuple[str, Outcome]]:
    """Answer every example with every method, and yield each method's name with the outcome.

    Methods that support it read a text with several questions only once. Examples of the same text must be adjacent.
    """
    for text, same_text in itertools.groupby(examples, key=lambda example: example.text):
        group, documents = list(same_text), {}
        if len(group) > 1:
            documents = {name: model.document(text, method=method) for name, method in methods.items()}
        for example in group:
            limit = task.new_tokens(example)
            for name, method in methods.items():
                if name in documents:
                    result = documents[name].ask(example.question, max_new_tokens=limit)
                else:
                    result = model.generate(text, example.question, method=method, max_new_tokens=limit)
                yield name, _outcome(task, example, result)


def _outcome(task: Task, example: Example, result: Result) -> Outcome:
    scores = {**task.score(example, result.text), **_kept(example, result)}
    return Outcome(example, result.text, scores, result.timings)


def _kept(example: Example, result: Result) -> dict[str, float]:
    """Scores of an example's spans, empty if it has none; see `Outcome`."""
    if not example.spans:
        return {}
    lengths = [end - start for start, end in example.spans]
    covered = [
        sum(max(0, min(end, last) - max(start, first)) for first, last in result.selection.spans)
        for start, end in example.spans
    ]
    whole = [kept >= WHOLE * length for kept, length in zip(covered, lengths, strict=True)]
    return {"kept": sum(covered) / sum(lengths), "facts_kept": sum(whole) / len(whole)}
