"""The first and the last tokens of a document."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from gemfilter_jax.methods.base import Method, Progress
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.settings import option_of

if TYPE_CHECKING:
    import numpy as np

    from gemfilter_jax.config import ModelConfig
    from gemfilter_jax.models.transformer import Decoder
    from gemfilter_jax.text.prompt import Prompt
    from gemfilter_jax.timing import Stopwatch


@dataclasses.dataclass(frozen=True)
class FirstLast(Method):
    """Cut the middle of the document out: keep as many tokens at its start as at its end, a floor.

    LongBench (arXiv 2308.14508) cuts prompts in this way.

    Attributes:
      keep: K, tokens kept, required ones included.
    """

    variants: ClassVar[Mapping[str, str]] = {"first_last": "the start and the end of the document"}

    keep: int = option_of(GemFilter, "keep")

    @property
    def budget(self) -> int:
        """K."""
        return self.keep

    def select(
        self,
        model: "Decoder",
        prompts: "Sequence[Prompt]",
        *,
        watch: "Stopwatch",
        progress: Progress | None = None,
    ) -> "list[np.ndarray]":
        """See `Method.select`."""
        import numpy as np

        del watch, progress
        self.check(model)
        kept = []
        for prompt in prompts:
            self.check_required(prompt, self.keep)
            free = np.flatnonzero(~prompt.required)
            left = max(min(self.keep, len(prompt)) - (len(prompt) - len(free)), 0)
            chosen = np.concatenate([free[: left - left // 2], free[len(free) - left // 2 :]])
            kept.append(np.sort(np.append(np.flatnonzero(prompt.required), chosen)))
        return kept

    def work(self, config: "ModelConfig") -> str:
        """No layer."""
        del config
        return "no layer picked"
