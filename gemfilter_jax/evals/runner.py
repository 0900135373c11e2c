"""Answers the examples of a task by one method or several."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from gemfilter_jax.errors import UserError, out_of_memory
from gemfilter_jax.evals import result_file
from gemfilter_jax.evals.example import Example, Outcome
from gemfilter_jax.parallel import processes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gemfilter_jax.evals.task import Task
    from gemfilter_jax.methods.base import Method
    from gemfilter_jax.pipeline import Document, Pipeline


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A method with a budget, as tables show it.

    Attributes:
      name: the method's variant.
      keep: its budget in tokens, "auto", or "all".
    """

    name: str
    keep: int | str
    method: "Method"

    @property
    def label(self) -> str:
        """Name and budget."""
        return result_file.label(self.name, self.keep)


@dataclasses.dataclass(frozen=True)
class Trial:
    """An example for a contestant.

    Attributes:
      length: the text's length in tokens as it was asked for; None if texts have lengths of their own.
      number: of the example among those of this length, from 0.
    """

    length: int | None
    number: int
    example: Example
    contestant: Contestant


def trials(
    task: "Task",
    tokenizer: "PreTrainedTokenizerBase",
    lengths: Sequence[int],
    contestants: Sequence[Contestant],
    *,
    shard: tuple[int, int] = (0, 1),
) -> list[Trial]:
    """All trials of a run in order: by text, then by contestant, then by question about the text.

    Args:
      lengths: in tokens; not used by a task whose texts have lengths of their own.
      shard: (index, N): of N parts of the texts only this one.

    Raises:
      UserError: examples cannot be made, or there are fewer texts than the shard's index.
    """
    asked: list[int | None] = list(lengths) if task.sized else [None]
    made = []
    texts = itertools.count()
    for length in asked:
        numbered = enumerate(task.examples(tokenizer, length or 0))
        for _, same_text in itertools.groupby(numbered, key=lambda pair: pair[1].text):
            group = list(same_text)
            if next(texts) % shard[1] == shard[0]:
                made += [Trial(length, number, one, each) for each in contestants for number, one in group]
    if not made:
        raise UserError(f"shard {shard[0] + 1}/{shard[1]} is empty: the run has {next(texts)} texts")
    return made


def run(
    model: "Pipeline", task: "Task", asked: Sequence[Trial], *, answer: bool = True
) -> Iterator[tuple[Trial, Outcome]]:
    """Run trials in order. A method that can do so reads a text only once for all questions and budgets.

    A trial that is refused, such as full attention beyond the context, or that the device's memory is too small for has
    an outcome with an error.

    Args:
      answer: if not, only what methods keep of the texts is scored.
    """
    for _, alike in itertools.groupby(asked, key=_read_as):
        group = list(alike)
        example, method = group[0].example, group[0].contestant.method
        own = _with_format(model, example)
        document = own.document(example.text, method=method) if len(group) > 1 else None
        for trial in group:
            try:
                yield trial, _outcome(own, task, trial, document, answer=answer)
            except UserError as error:
                yield trial, Outcome(error=str(error))
            except Exception as error:
                if not out_of_memory(error) or processes.is_one_of_several():
                    raise
                yield trial, Outcome(error="the device's memory is too small")


def _read_as(trial: Trial) -> tuple:
    """Equal for trials that one reading of a text serves."""
    return trial.contestant.name, trial.example.text, trial.example.message_format, trial.example.plain


def _with_format(model: "Pipeline", example: Example) -> "Pipeline":
    """The pipeline with an example's message format."""
    if example.message_format is None and not example.plain:
        return model
    return dataclasses.replace(
        model,
        message_format=example.message_format or model.message_format,
        chat_template=model.chat_template and not example.plain,
    )


def _outcome(model: "Pipeline", task: "Task", trial: Trial, document: "Document | None", *, answer: bool) -> Outcome:
    """The outcome of a trial; `document` is the text if it serves several trials."""
    example, method = trial.example, trial.contestant.method
    if not answer:
        select = functools.partial(model.select, example.text) if document is None else document.select
        kept, timings = select(example.question, method=method)
        return Outcome(
            scores=task.score_kept(example, kept),
            prompt_tokens=kept.prompt_tokens,
            timings=timings,
            recall_estimate=kept.recall_estimate,
        )
    ask = functools.partial(model.generate, example.text) if document is None else document.ask
    result = ask(example.question, method=method, max_new_tokens=task.new_tokens(example))
    scores = dict(task.score(example, result.text))
    if method.eviction is None:
        scores |= task.score_kept(example, result.selection)
    kept = result.selection
    return Outcome(result.text, scores, kept.prompt_tokens, result.timings, kept.recall_estimate)
