"""H2O (arXiv 2306.14048)."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from gemfilter_jax.methods.eviction import EvictingMethod, best_keys, score_by_key_head
from gemfilter_jax.settings import option

if TYPE_CHECKING:
    import jax

    from gemfilter_jax.models.hooks import Visit


@dataclasses.dataclass(frozen=True)
class H2O(EvictingMethod):
    """Keep the keys and values with the most attention from all rows, the heavy hitters, and the last ones.

    A key's score is the attention that it gets from all rows of the prompt, summed over the query heads that share the
    key head (arXiv 2306.14048). The prompt is evicted once, when it has been read.

    Attributes:
      recent: of the K tokens so many at the prompt's end; None for half of them.
    """

    variants: ClassVar[Mapping[str, str]] = {"h2o": "the keys and values that all rows attend to, and the last ones"}

    recent: int | None = option(None, "Last tokens that are kept; half of all unless given.", at_least=1)

    @property
    def reserved(self) -> tuple[str, int]:
        """See `EvictingMethod`."""
        return "recent", self.keep // 2 if self.recent is None else self.recent

    def kept(self, visit: "Visit", lengths: "jax.Array") -> "jax.Array":
        """See `Eviction`."""
        from gemfilter_jax.ops.key_scores import score_keys_by_all_rows

        score = functools.partial(
            score_keys_by_all_rows,
            visit.q,
            lengths,
            visit.k,
            normalisation="softmax",
            window=visit.sliding_window,
            positions=visit.positions,
        )
        scores = score_by_key_head(score, visit)
        return best_keys(scores, lengths, keep=self.keep, slots=self.slots(visit.k.shape[1]), last=self.reserved[1])
