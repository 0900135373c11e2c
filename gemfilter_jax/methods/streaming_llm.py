"""StreamingLLM (arXiv 2309.17453)."""

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Self

from gemfilter_jax.errors import UserError
from gemfilter_jax.methods.base import Method
from gemfilter_jax.settings import option

if TYPE_CHECKING:
    import jax

    from gemfilter_jax.methods.presets import Preset
    from gemfilter_jax.models.transformer import Visit


@dataclasses.dataclass(frozen=True)
class StreamingLLM(Method):
    """Keep the keys and values of the first tokens, the attention sinks, and of the last ones (arXiv 2309.17453).

    The prompt is read whole, with full attention, and evicted layer by layer. Kept keys stay rotated by their positions
    in the prompt. Tokens of the answer are not evicted.

    Attributes:
      keep: tokens kept of the prompt, sinks included.
      sinks: of these so many at its start.
    """

    variants: ClassVar[tuple[str, ...]] = ("streaming_llm",)
    keep: int = option(1024, "Tokens of the prompt whose keys and values are kept.", at_least=1)
    sinks: int = option(4, "First tokens that are kept, the attention sinks.", at_least=0)

    @classmethod
    def of(cls, variant: str, preset: "Preset", **given: Any) -> Self:
        """With the preset's budget where none is given."""
        own = cls._own({"keep": preset.default.keep} | given)
        if not isinstance(own["keep"], int):
            raise UserError(f"{variant} keeps a number of tokens; give it in place of keep={own['keep']}")
        return cls(**own)

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
        columns = jnp.where(slots < min(self.sinks, self.keep), slots, slots + evicted)
        return jnp.where(columns < lengths[:, None], columns, length)
