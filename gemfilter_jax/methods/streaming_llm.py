"""StreamingLLM (arXiv 2309.17453)."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from gemfilter_jax.errors import UserError
from gemfilter_jax.methods.base import Method
from gemfilter_jax.settings import option

if TYPE_CHECKING:
    import jax

    from gemfilter_jax.models.transformer import Decoder, Visit


@dataclasses.dataclass(frozen=True)
class StreamingLLM(Method):
    """Keep the keys and values of the first tokens, the attention sinks, and of the last ones (arXiv 2309.17453).

    The prompt is read whole, with full attention, and evicted layer by layer. Kept keys stay rotated by their positions
    in the prompt. Tokens of the answer are not evicted.

    Attributes:
      keep: tokens kept of the prompt, sinks included.
      sinks: of these so many at its start.
    """

    variants: ClassVar[Mapping[str, str]] = {"streaming_llm": "the first and the last keys and values"}

    keep: int = option(1024, "Tokens of the prompt whose keys and values are kept.", at_least=1)
    sinks: int = option(4, "First tokens that are kept, the attention sinks.", at_least=0)

    def check(self, model: "Decoder") -> None:
        """See `Method.check`."""
        super().check(model)
        if self.sinks >= self.keep:
            raise UserError(f"sinks is {self.sinks} and keep {self.keep}, which leaves no room for the last tokens")

    @property
    def budget(self) -> int:
        """K."""
        return self.keep

    @property
    def eviction(self) -> "StreamingLLM":
        """Itself."""
        return self

    def slots(self, prompt: int) -> int:
        """See `Eviction`."""
        return min(self.keep, prompt)

    def kept(self, visit: "Visit", lengths: "jax.Array") -> "jax.Array":
        """See `Eviction`; the same in all layers."""
        import jax.numpy as jnp

        length = visit.k.shape[1]
        slots = jnp.arange(self.slots(length))
        evicted = jnp.maximum(lengths[:, None] - len(slots), 0)
        columns = jnp.where(slots < self.sinks, slots, slots + evicted)
        return jnp.where(columns < lengths[:, None], columns, length)
