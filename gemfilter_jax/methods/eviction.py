"""Methods that read a whole prompt and keep some of its keys and values, and what they share."""

import abc
import dataclasses
from typing import TYPE_CHECKING, Protocol

from gemfilter_jax.errors import UserError
from gemfilter_jax.methods.base import Method, Pooling
from gemfilter_jax.settings import option

if TYPE_CHECKING:
    import jax

    from gemfilter_jax.models.hooks import Propagation, Visit
    from gemfilter_jax.models.transformer import Decoder


@dataclasses.dataclass(frozen=True)
class EvictingMethod(Method):
    """A method that reads the prompt with full attention and evicts keys and values layer by layer.

    Kept keys stay rotated by their positions in the prompt. Tokens of the answer are not evicted. A subclass says in
    `kept` which tokens stay at a layer.

    Attributes:
      keep: K, tokens of the prompt whose keys and values are kept, in every layer and by every key head.
    """

    keep: int = option(1024, "Tokens of the prompt whose keys and values are kept.", at_least=1)

    @property
    @abc.abstractmethod
    def reserved(self) -> tuple[str, int]:
        """The name of an option, and how many tokens it keeps whatever their scores; must be below K."""

    def check(self, model: "Decoder") -> None:
        """See `Method.check`."""
        super().check(model)
        name, count = self.reserved
        if count >= self.keep:
            raise UserError(f"{name} is {count} and keep {self.keep}, which leaves no room for other tokens")

    @property
    def budget(self) -> int:
        """K."""
        return self.keep

    @property
    def eviction(self) -> "EvictingMethod":
        """Itself."""
        return self

    def slots(self, prompt: int) -> int:
        """See `Eviction`."""
        return min(self.keep, prompt)

    @abc.abstractmethod
    def kept(self, visit: "Visit", lengths: "jax.Array") -> "jax.Array":
        """See `Eviction`."""

    @property
    def propagation(self) -> "Propagation | None":
        """See `Eviction`; None unless overridden."""
        return None


class Score(Protocol):
    """Scores of keys: `key_scores.score_keys` or `score_keys_by_all_rows`, given all but the weights of heads."""

    def __call__(self, *, head_weights: "jax.Array") -> "jax.Array": ...  # noqa: D102


def score_by_key_head(score: Score, visit: "Visit") -> "jax.Array":
    """float32 [B, G, S], the scores of keys, summed over the query heads of each of this device's key heads."""
    import jax
    import jax.numpy as jnp

    from gemfilter_jax.parallel import collectives

    heads, devices, here = visit.q.shape[2], collectives.axis_size("model"), collectives.axis_index("model")
    group = (here * heads + jnp.arange(heads)) // (heads * devices // visit.key_heads)
    scores = score(head_weights=(group == jnp.arange(visit.key_heads)[:, None]).astype(jnp.float32))
    return jax.lax.dynamic_slice_in_dim(scores, here * visit.key_heads // devices, visit.k.shape[2], axis=1)


def best_keys(
    scores: "jax.Array",
    lengths: "jax.Array",
    *,
    keep: "jax.typing.ArrayLike",
    slots: int,
    last: int,
    pooling: Pooling = "none",
    pool_size: int = 1,
) -> "jax.Array":
    """int32 [B, G, K], the best keys of each key head, as `Eviction.kept` gives them; the last ones are always kept.

    Args:
      scores: float32 [B, G, S]. lengths: int [B]. keep: tokens to keep, one number or one for each row [B]. slots: K.
      last: how many keys at the end of each prompt are kept. They do not enter the pools of others.
    """
    import jax.numpy as jnp
    from einops import rearrange, repeat

    from gemfilter_jax.methods import selection

    groups = scores.shape[1]
    by_head = repeat(lengths, "b -> (b g)", g=groups)
    keep = repeat(jnp.broadcast_to(jnp.asarray(keep), lengths.shape), "b -> (b g)", g=groups)
    chosen = selection.select(
        rearrange(scores, "b g s -> (b g) s"),
        by_head,
        keep=keep,
        capacity=slots,
        required=jnp.arange(scores.shape[2]) >= (by_head - last)[:, None],
        pooling=pooling,
        pool_size=pool_size,
    )
    return rearrange(chosen.indices, "(b g) k -> b g k", g=groups)
