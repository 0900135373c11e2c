"""The first and the last tokens of a document."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from gemfilter_jax.methods.model_free import ModelFree

if TYPE_CHECKING:
    import numpy as np

    from gemfilter_jax.text.prompt import Prompt


@dataclasses.dataclass(frozen=True)
class FirstLast(ModelFree):
    """Cut the middle of the document out: keep as many tokens at its start as at its end.

    LongBench (arXiv 2308.14508) cuts prompts in this way.
    """

    variants: ClassVar[Mapping[str, str]] = {"first_last": "the start and the end of the document"}

    def kept(self, prompt: "Prompt") -> "np.ndarray":
        """See `ModelFree`."""
        import numpy as np

        required, free = np.flatnonzero(prompt.required), np.flatnonzero(~prompt.required)
        left = self.keep - len(required)
        return np.sort(np.concatenate([required, free[: left - left // 2], free[len(free) - left // 2 :]]))
