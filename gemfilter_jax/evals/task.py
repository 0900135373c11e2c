"""What an evaluation task is: examples of questions about long texts, and a score for an answer."""

import abc
import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals.summary import Column

if TYPE_CHECKING:  # commands read the tasks' options before they import JAX
    from transformers import PreTrainedTokenizerBase

_OPTION = "option"


@dataclasses.dataclass(frozen=True)
class Example:
    """A question about a long text.

    Attributes:
      name: what is asked for, for reports.
      text: the long text, without the question.
      question: asks for one thing or for several.
      references: what a right answer says.
      tokens: about how many tokens `text` has.
      spans: the passages of `text` that hold the references, as character offsets [start, end); empty if unknown.
    """

    name: str
    text: str
    question: str
    references: tuple[str, ...]
    tokens: int
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def depth(self) -> float | None:
        """Where the first span starts: 0 at the start of the text, 1 at its end; None without spans."""
        return min(self.spans)[0] / len(self.text) if self.spans else None


@dataclasses.dataclass(frozen=True)
class Option:
    """A setting of a task that its user chooses.

    Attributes:
      kind: int, float, str or bool.
      default: None only if `kind` is str.
      at_least, at_most: inclusive bounds of a number; None where there is none.
    """

    name: str
    kind: type
    default: Any
    help: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def range(self) -> str:
        """The bounds in words, empty if there are none."""
        if self.at_least is None and self.at_most is None:
            return ""
        if self.at_most is None:
            return f"of at least {self.at_least}"
        return f"of at most {self.at_most}" if self.at_least is None else f"in [{self.at_least}, {self.at_most}]"

    def check(self, value: Any, shown: str) -> None:
        """Raise a `UserError` that begins with `shown` if the value is out of bounds."""
        low, high = self.at_least, self.at_most
        if (low is not None and value < low) or (high is not None and value > high):
            raise UserError(f"{shown}: expected a number {self.range}")


def option(default: Any, help: str, *, at_least: float | None = None, at_most: float | None = None) -> Any:
    """A dataclass field of a `Task` that is one of its options; its annotation is the option's kind."""
    metadata = {_OPTION: {"help": help, "at_least": at_least, "at_most": at_most}}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """An evaluation task: a frozen dataclass, which the registry in `tasks` names.

    The first paragraph of its docstring is its help text. Fields made by `option` become flags of the command line.

    Attributes:
      name: what the command line calls it.
      title: heads its table.
      columns: of its table; if empty, one for each score.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]] = ()

    def __post_init__(self):
        for one in self.options():
            value = getattr(self, one.name)
            one.check(value, f"{one.name} is {value}")

    @classmethod
    def options(cls) -> tuple[Option, ...]:
        """The fields that its user chooses, in order."""
        hints = typing.get_type_hints(cls)
        return tuple(
            Option(field.name, _kind(hints[field.name]), field.default, **field.metadata[_OPTION])
            for field in dataclasses.fields(cls)
            if _OPTION in field.metadata
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The value of each option by name."""
        return {one.name: getattr(self, one.name) for one in self.options()}

    @abc.abstractmethod
    def examples(self, tokenizer: "PreTrainedTokenizerBase", tokens: int) -> Iterator[Example]:
        """At least one example, of texts of about `tokens` tokens; those of one text follow each other.

        Equal tasks give equal examples.

        Raises:
          UserError: no such examples can be made.
        """

    @abc.abstractmethod
    def new_tokens(self, example: Example) -> int:
        """How many tokens an answer may have, at least 1."""

    @abc.abstractmethod
    def score(self, example: Example, answer: str) -> Mapping[str, float]:
        """Scores by name, each from 0 to 1; a verdict is a bool. All examples have the same names."""


def _kind(hint: Any) -> type:
    """The type of an annotation such as `int` or `str | None`."""
    return next(kind for kind in (*typing.get_args(hint), hint) if kind is not types.NoneType)
