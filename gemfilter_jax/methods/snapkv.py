"""SnapKV (arXiv 2404.14469)."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from gemfilter_jax.methods.base import Pooling
from gemfilter_jax.methods.eviction import EvictingMethod, best_keys, score_by_key_head
from gemfilter_jax.settings import option

if TYPE_CHECKING:
    import jax

    from gemfilter_jax.models.hooks import Visit


@dataclasses.dataclass(frozen=True)
class SnapKV(EvictingMethod):
    """Keep the keys and values that the last rows attend to, and those of the last rows (arXiv 2404.14469).

    A key's score is the attention that it gets from the observation window, summed over the window's rows and over the
    query heads that share the key head, then pooled with its neighbours'. The published code gives each query head keys
    and values of its own; here the query heads of a group share theirs, so that the cache is small under grouped-query
    attention too.

    Attributes:
      observation_window: W, the last tokens of the prompt.
      pooling, pool_size: neighbours pooled before ranking; a mean counts zeros beyond the ends.
    """

    variants: ClassVar[Mapping[str, str]] = {"snapkv": "the keys and values that the last rows attend to"}

    observation_window: int = option(32, "Last tokens of the prompt, whose attention is counted.", at_least=1)
    pooling: Pooling = option("mean", "Pooling of the scores of neighbours.")
    pool_size: int = option(5, "Neighbours that are pooled.", at_least=1)

    @property
    def reserved(self) -> tuple[str, int]:
        """See `EvictingMethod`."""
        return "observation_window", self.observation_window

    def kept(self, visit: "Visit", lengths: "jax.Array") -> "jax.Array":
        """See `Eviction`."""
        return self._best(self.scores(visit, lengths), lengths, keep=self.keep, slots=self.slots(visit.k.shape[1]))

    def scores(self, visit: "Visit", lengths: "jax.Array") -> "jax.Array":
        """float32 [B, G, S], the attention of the observation window to each key, by key head."""
        import jax.numpy as jnp

        from gemfilter_jax.ops.key_scores import score_keys

        rows = lengths[:, None] - self.observation_window + jnp.arange(self.observation_window)
        q = jnp.take_along_axis(visit.q, jnp.maximum(rows, 0)[..., None, None], axis=1)
        score = functools.partial(
            score_keys,
            q,
            rows,
            visit.k,
            normalisation="softmax",
            window=visit.sliding_window,
            positions=visit.positions,
        )
        return score_by_key_head(score, visit)

    def _best(
        self, scores: "jax.Array", lengths: "jax.Array", *, keep: "jax.typing.ArrayLike", slots: int
    ) -> "jax.Array":
        """See `best_keys`."""
        return best_keys(
            scores,
            lengths,
            keep=keep,
            slots=slots,
            last=self.observation_window,
            pooling=self.pooling,
            pool_size=self.pool_size,
        )
