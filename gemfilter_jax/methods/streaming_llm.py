"""StreamingLLM (arXiv 2309.17453)."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from gemfilter_jax.methods.eviction import EvictingMethod
from gemfilter_jax.settings import option

if TYPE_CHECKING:
    import jax

    from gemfilter_jax.models.hooks import Visit


@dataclasses.dataclass(frozen=True)
class StreamingLLM(EvictingMethod):
    """Keep the keys and values of the first tokens, the attention sinks, and of the last ones (arXiv 2309.17453).

    Attributes:
      sinks: of the K tokens so many at the prompt's start.
    """

    variants: ClassVar[Mapping[str, str]] = {"streaming_llm": "the first and the last keys and values"}

    sinks: int = option(4, "First tokens that are kept, the attention sinks.", at_least=0)

    @property
    def reserved(self) -> tuple[str, int]:
        """See `EvictingMethod`."""
        return "sinks", self.sinks

    def kept(self, visit: "Visit", lengths: "jax.Array") -> "jax.Array":
        """See `Eviction`; the same in all layers."""
        import jax.numpy as jnp

        length = visit.k.shape[1]
        slots = jnp.arange(self.slots(length))
        evicted = jnp.maximum(lengths[:, None] - len(slots), 0)
        columns = jnp.where(slots < self.sinks, slots, slots + evicted)
        return jnp.where(columns < lengths[:, None], columns, length)
