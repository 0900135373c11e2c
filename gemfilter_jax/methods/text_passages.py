"""Methods that score passages by their text, without a model."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from gemfilter_jax.methods.base import Method, Order, Progress
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
class TextPassages(Method):
    """A method that keeps whole passages as GemFilter's default rule does, but scores them in its own way, in `scores`.

    Attributes:
      keep, chunk, sentences, order: see `GemFilter`; the preset's unless given.
    """

    keep: int = option_of(GemFilter, "keep")
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
    def budget(self) -> int:
        """K."""
        return self.keep

    @property
    def observation_rows(self) -> int:
        """GemFilter's."""
        return GemFilter.observation_window

    def select(
        self,
        model: "Decoder",
        prompts: "Sequence[Prompt]",
        *,
        watch: "Stopwatch",
        progress: Progress | None = None,
    ) -> "list[np.ndarray]":
        """See `Method.select`."""
        del progress
        self.check(model)
        for prompt in prompts:
            self.check_required(prompt, self.keep)
        with watch.stage("filter"):
            return [self._kept(prompt) for prompt in prompts]

    def _kept(self, prompt: "Prompt") -> "np.ndarray":
        import numpy as np

        from gemfilter_jax.methods import passages

        rows = np.arange(len(prompt))
        if len(prompt) <= self.keep:
            return rows
        rule = passages.PassageRule.of(self)
        numbers = passages.chunks(prompt, rule)
        document = np.flatnonzero(~prompt.required)
        chunks, first, sizes = np.unique(numbers[document], return_index=True, return_counts=True)
        starts, ends = prompt.offsets[document[first], 0], prompt.offsets[document[first + sizes - 1], 1]
        texts = [prompt.text[start:end] for start, end in zip(starts, ends, strict=True)]
        scores = np.zeros(len(prompt), np.float32)
        scores[document] = self.scores(prompt, texts)[np.searchsorted(chunks, numbers[document])]
        return passages.kept([scores], [prompt], [rows], rule)[0]

    def work(self, config: "ModelConfig") -> str:
        """No layer."""
        del config
        return "no layer picked"
