"""What a method is: settings that say what to keep of a prompt, and the code that does it.

A method is a frozen dataclass in a file of its own, which `methods.METHODS` lists. There are two kinds. One chooses
tokens of the prompt, and the model answers from those alone: it overrides `select`. The other has the model read the
whole prompt and keeps some of its keys and values: it overrides `eviction`.

Methods are read before JAX is imported, so that the command line can tell a mistake at once; they import JAX, and
modules that do, where they need them.
"""

import abc
import dataclasses
import pathlib
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from gemfilter_jax import settings
from gemfilter_jax.errors import UserError
from gemfilter_jax.settings import Option

if TYPE_CHECKING:
    import numpy as np

    from gemfilter_jax.config import ModelConfig
    from gemfilter_jax.methods.presets import Preset
    from gemfilter_jax.models.hooks import Eviction
    from gemfilter_jax.models.transformer import Decoder
    from gemfilter_jax.text.prompt import Prompt
    from gemfilter_jax.timing import Stopwatch

Progress = Callable[[int, int], None]
"""Told (tokens read, tokens to read) as a prompt is read."""

Order = Literal["text", "best_last"]
"""In what order kept passages are read: as in the text, or the best one last."""

Pooling = Literal["none", "mean", "max"]
"""How the scores of neighbouring tokens are pooled; see `selection.pool`."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a method keeps of a prompt.

    Attributes:
      indices: int, the kept tokens in the order in which the model reads them.
      recall: estimated probability that they hold the answer, if the document does; None if there is no estimate, or
        nothing to estimate, since all is kept.
    """

    indices: "np.ndarray"
    recall: float | None = None

    @classmethod
    def everything(cls, prompt: "Prompt") -> Self:
        """All of a prompt."""
        import numpy as np

        return cls(np.arange(len(prompt)))


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
    """What to keep of a prompt. Its options are the fields made by `settings.option`.

    Attributes:
      variants: names of its forms, with their help. Each is a starting point for the options that are given.
    """

    variants: ClassVar[Mapping[str, str]]

    @classmethod
    def of(cls, variant: str, preset: "Preset", **given: Any) -> Self:
        """One of the variants for a model; an option `keep` that is not given is the preset's.

        Args:
          given: values of options that the user chose. Options of other methods are ignored.

        Raises:
          UserError: this variant cannot have a given value.
        """
        own = cls._own(given)
        if own.get("keep") is None:
            own |= cls._own({"keep": preset.default.keep})
        if own.get("keep") == "auto":
            raise UserError(f"{variant} keeps a number of tokens; give it in place of keep=auto")
        return cls(**own)

    @classmethod
    def options(cls) -> tuple[Option, ...]:
        """What its user chooses, in order."""
        return settings.options_of(cls)

    @classmethod
    def _own(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The given values that are options of this method, checked; variants may give a `keep` of None or "auto"."""
        options = {one.name: one for one in cls.options()}
        own = {name: settings.plain(value) for name, value in given.items() if name in options}
        for name, value in own.items():
            if name != "keep" or (value is not None and value != "auto"):
                options[name].check(value, f"{name} is {reprlib.repr(value)}, ")
        return own

    @property
    def fields(self) -> dict[str, Any]:
        """Its JSON form."""
        return settings.to_json(self)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], config: "ModelConfig", source: str) -> Self:
        """A method from its JSON form.

        Args:
          config: of the model that it is for. source: where the fields come from, for errors.

        Raises:
          UserError: a field is unknown, or its value does not fit.
        """
        del config
        return cls(**settings.from_json(cls, fields, source))

    def check(self, model: "Decoder") -> None:
        """Raise a `UserError` if the method cannot serve a model, whatever the prompt."""
        del model
        settings.check(self)

    def check_prompt(self, model: "Decoder", prompt: "Prompt") -> None:
        """Raise a `UserError` if the method cannot serve this model and prompt."""
        del prompt
        self.check(model)

    def check_required(self, prompt: "Prompt", keep: int) -> None:
        """Raise a `UserError` if the template and the question of a prompt are more than `keep` tokens."""
        required = prompt.prefix_length + prompt.suffix_length
        if keep < min(required, len(prompt)):
            raise UserError(
                f"keep is {keep}, but the template and the question alone are {required} tokens; keep more than that"
            )

    @property
    def budget(self) -> int | None:
        """The most tokens of a prompt that are kept, shown in tables; None if all are."""
        return None

    @property
    def keep_shown(self) -> int | str:
        """The budget as results name it: a number of tokens, "auto", or "all"."""
        return "all" if self.budget is None else self.budget

    @property
    def observation_rows(self) -> int:
        """How many tokens at the end of a text stand for its question where none is asked apart."""
        return 0

    @property
    def keeps_positions(self) -> bool:
        """Whether kept tokens have the positions that they have in the prompt, and not 0, 1, 2 and so on."""
        return False

    @property
    def eviction(self) -> "Eviction | None":
        """Which keys and values of the prompt stay in the cache; None for those of all tokens that `select` keeps."""
        return None

    def select(
        self,
        model: "Decoder",
        prompts: "Sequence[Prompt]",
        *,
        watch: "Stopwatch",
        progress: Progress | None = None,
    ) -> list[Kept]:
        """The tokens of each prompt that the model answers from.

        An override begins with `check_prompt` of each, and keeps every token of `Prompt.required`.

        Args:
          watch: times what is done, in a stage "filter".

        Raises:
          UserError: the method does not fit the model or a prompt.
        """
        del watch, progress
        self.check(model)
        return [Kept.everything(prompt) for prompt in prompts]

    def reader(self, model: "Decoder", cache: pathlib.Path | None) -> "Reader":
        """Reads prompts that share a document. Unless overridden, each prompt is read from its start.

        Args:
          cache: a folder in which what is read of the document may be kept for other processes.
        """
        del cache
        return _ReadAnew(self, model)

    def work(self, config: "ModelConfig") -> str:
        """How much of a model `select` ran, for people."""
        del config
        return "all layers read everything"


class Reader(abc.ABC):
    """Reads prompts that differ in their question alone, and may remember their document."""

    @abc.abstractmethod
    def select(
        self,
        prompt: "Prompt",
        *,
        method: Method | None = None,
        watch: "Stopwatch",
        progress: Progress | None = None,
    ) -> Kept:
        """What `Method.select` gives for the prompt.

        Args:
          method: with other options than the reader's, such as another budget; None for the reader's.
        """


@dataclasses.dataclass(frozen=True)
class _ReadAnew(Reader):
    method: Method
    model: "Decoder"

    def select(
        self,
        prompt: "Prompt",
        *,
        method: Method | None = None,
        watch: "Stopwatch",
        progress: Progress | None = None,
    ) -> Kept:
        """Without a memory."""
        return (method or self.method).select(self.model, [prompt], watch=watch, progress=progress)[0]
