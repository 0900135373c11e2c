"""Methods that choose tokens without a model."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from gemfilter_jax.methods.base import Kept, Method, Order, Progress
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.settings import option_of

if TYPE_CHECKING:
    import numpy as np

    from gemfilter_jax.config import ModelConfig
    from gemfilter_jax.methods.presets import Preset
    from gemfilter_jax.models.transformer import Decoder
    from gemfilter_jax.text.prompt import Prompt
    from gemfilter_jax.timing import Stopwatch


@dataclasses.dataclass(frozen=True)
class ModelFree(Method):
    """A method that chooses tokens by the prompt's text alone, in `kept`.

    Attributes:
      keep: K, tokens kept, required ones included.
    """

    keep: int = option_of(GemFilter, "keep")

    @abc.abstractmethod
    def kept(self, prompt: "Prompt") -> "np.ndarray":
        """The kept tokens of a prompt of more than K tokens; see `Method.select`."""

    @property
    def budget(self) -> int:
        """K."""
        return self.keep

    def check_prompt(self, model: "Decoder", prompt: "Prompt") -> None:
        """See `Method.check_prompt`."""
        super().check_prompt(model, prompt)
        self.check_required(prompt, self.keep)

    def select(
        self,
        model: "Decoder",
        prompts: "Sequence[Prompt]",
        *,
        watch: "Stopwatch",
        progress: Progress | None = None,
    ) -> list[Kept]:
        """See `Method.select`."""
        del progress
        for prompt in prompts:
            self.check_prompt(model, prompt)
        with watch.stage("filter"):
            return [
                Kept(self.kept(prompt)) if len(prompt) > self.keep else Kept.everything(prompt) for prompt in prompts
            ]

    def work(self, config: "ModelConfig") -> str:
        """No layer."""
        del config
        return "no layer picked"


@dataclasses.dataclass(frozen=True)
class TextPassages(ModelFree):
    """A method that keeps whole passages as GemFilter's default rule does, but scores them in its own way, in `scores`.

    Attributes:
      chunk, sentences, order: see `GemFilter`; the preset's unless given.
    """

    chunk: int = option_of(GemFilter, "chunk")
    sentences: bool = option_of(GemFilter, "sentences")
    order: Order = option_of(GemFilter, "order")

    @abc.abstractmethod
    def scores(self, prompt: "Prompt", passages: Sequence[str]) -> "np.ndarray":
        """float [N], a score for each of N passages of a prompt; the highest are kept."""

    @classmethod
    def of(cls, variant: str, preset: "Preset", **given: Any) -> Self:
        """See `Method.of`."""
        own = {name: getattr(preset.default, name) for name in ("chunk", "sentences", "order")}
        return super().of(variant, preset, **own | given)

    @property
    def observation_rows(self) -> int:
        """GemFilter's."""
        return GemFilter.observation_window

    def kept(self, prompt: "Prompt") -> "np.ndarray":
        """See `ModelFree`."""
        import numpy as np

        from gemfilter_jax.methods import passages

        rule, rows = passages.PassageRule.of(self), np.arange(len(prompt))
        listed = passages.listed(prompt, rule, rows)
        scores = listed.for_each_token(self.scores(prompt, listed.texts), len(rows))
        return passages.kept([scores], [prompt], [rows], rule)[0]
