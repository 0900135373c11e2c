"""The interface of evaluation tasks: examples of questions about long texts, and scores of answers."""

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from gemfilter_jax.evals.example import Example
from gemfilter_jax.evals.summary import Column
from gemfilter_jax.settings import Option, options_of

if TYPE_CHECKING:  # commands read the tasks' options before they import JAX
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """An evaluation task: a frozen dataclass that is listed in the registry in `tasks`.

    The first paragraph of its docstring is its help text. Fields made by `settings.option` become flags.

    Attributes:
      name: name on the command line.
      title: heading of the result table.
      columns: columns of the result table; if empty, one for each score.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]] = ()

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

        Raises:
          UserError: such examples cannot be made.
        """

    @abc.abstractmethod
    def new_tokens(self, example: Example) -> int:
        """Maximum number of tokens of an answer, at least 1."""

    @abc.abstractmethod
    def score(self, example: Example, answer: str) -> Mapping[str, float]:
        """Scores by name: numbers from 0 to 1, or a bool for right or wrong. All examples have the same names."""
