"""Passages drawn at random."""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from gemfilter_jax.methods.model_free import TextPassages
from gemfilter_jax.settings import option

if TYPE_CHECKING:
    import numpy as np

    from gemfilter_jax.text.prompt import Prompt


@dataclasses.dataclass(frozen=True)
class RandomPassages(TextPassages):
    """Keep passages drawn at random, which any method should beat.

    Attributes:
      draw: seed of the draw; every prompt has its own.
    """

    variants: ClassVar[Mapping[str, str]] = {"random": "passages drawn at random"}

    draw: int = option(0, "Seed of the passages drawn at random.", at_least=0)

    def scores(self, prompt: "Prompt", passages: "Sequence[str]") -> "np.ndarray":
        """See `TextPassages`."""
        import numpy as np

        return np.random.default_rng([self.draw, zlib.crc32(prompt.ids.tobytes())]).random(len(passages))
