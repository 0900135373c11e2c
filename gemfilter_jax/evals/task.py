"""The interface of evaluation tasks: examples of questions about long texts, and scores of answers."""

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from gemfilter_jax.evals.example import Example
from gemfilter_jax.settings import Option, options_of

if TYPE_CHECKING:  # commands read the tasks' options before they import JAX
    from transformers import PreTrainedTokenizerBase

    from gemfilter_jax.results import KeptText

MOST_EXAMPLES = 100_000  # that a task makes of one kind, or puts together

WHOLE = 0.9
"""A span counts as kept if at least this share of its characters is kept: a missing full stop does no harm."""


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """An evaluation task: a frozen dataclass that is listed in the registry in `tasks`.

    The first paragraph of its docstring is its help text. Fields made by `settings.option` become flags.

    Attributes:
      name: name on the command line.
      title: heading of the result table.
      parts: what `Example.group` names, in the singular.
      main_score: the score by which methods are compared.
      sized: whether texts are made as long as asked. If not, they have lengths of their own.
      scores_kept: whether what a method keeps is scored; see `score_kept`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    parts: ClassVar[str] = "part"
    main_score: ClassVar[str] = "right"
    sized: ClassVar[bool] = True
    scores_kept: ClassVar[bool] = True

    def __post_init__(self):
        for one in self.options():
            value = getattr(self, one.name)
            one.check(value, f"{one.name} is {value}: ")

    @classmethod
    def options(cls) -> tuple[Option, ...]:
        """The fields that a user sets, in order."""
        return options_of(cls)

    @property
    def settings(self) -> dict[str, Any]:
        """The value of each option by name."""
        return {one.name: getattr(self, one.name) for one in self.options()}

    @abc.abstractmethod
    def examples(self, tokenizer: "PreTrainedTokenizerBase", tokens: int) -> Iterator[Example]:
        """At least one example, with texts of about `tokens` tokens; examples of the same text are adjacent.

        Equal tasks give equal examples.

        Args:
          tokens: 0 if the task's texts have lengths of their own.

        Raises:
          UserError: such examples cannot be made.
        """

    @abc.abstractmethod
    def new_tokens(self, example: Example) -> int:
        """Maximum number of tokens of an answer, at least 1."""

    @abc.abstractmethod
    def score(self, example: Example, answer: str) -> Mapping[str, float]:
        """Scores by name, numbers from 0 to 1. All examples have the same names."""

    def score_kept(self, example: Example, kept: "KeptText") -> Mapping[str, float]:
        """Scores of what a method kept; empty where nothing can be said.

        Unless overridden, "kept" is the share of the example's spans that are kept, see `WHOLE`.
        """
        if not example.spans:
            return {}
        whole = [_covered(span, kept.spans) >= WHOLE * (span[1] - span[0]) for span in example.spans]
        return {"kept": sum(whole) / len(whole)}


def _covered(span: tuple[int, int], kept: Sequence[tuple[int, int]]) -> int:
    """Number of characters of a span that kept spans, which do not overlap, cover."""
    return sum(max(0, min(span[1], end) - max(span[0], start)) for start, end in kept)
