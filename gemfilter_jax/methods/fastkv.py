"""FastKV (arXiv 2502.01068)."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from gemfilter_jax.errors import UserError
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.methods.snapkv import SnapKV
from gemfilter_jax.settings import option, option_of

if TYPE_CHECKING:
    import jax

    from gemfilter_jax.methods.presets import Preset
    from gemfilter_jax.models.hooks import Visit
    from gemfilter_jax.models.transformer import Decoder

_STEPS = 1000  # the share counts in thousandths, so that programs compute it in int32


@dataclasses.dataclass(frozen=True)
class FastKV(SnapKV):
    """Let the best tokens alone go on after one layer, and keep of each layer's keys and values what SnapKV would.

    All tokens pass the layers up to the filter layer. By the attention of the observation window there, summed over all
    heads and pooled, some are chosen; the later layers read their hidden states alone, at their positions in the prompt
    (arXiv 2502.01068).

    Attributes:
      filter_layer: r, 0-based, the last layer that reads all tokens.
      propagated_share: the share of the tokens that go on, observation window included; at least `keep` tokens do.
    """

    variants: ClassVar[Mapping[str, str]] = {"fastkv": "SnapKV's, of the tokens that go on after an early layer"}

    observation_window: int = option(8, "Last tokens of the prompt, whose attention is counted.", at_least=1)
    pool_size: int = option(7, "Neighbours that are pooled.", at_least=1)
    filter_layer: int = option_of(GemFilter, "filter_layer", kw_only=True)
    propagated_share: float = option(0.2, "Share of the tokens that later layers read.", at_least=0.001, at_most=1)

    @classmethod
    def of(cls, variant: str, preset: "Preset", **given: Any) -> Self:
        """See `Method.of`; the filter layer is the preset's for all heads alike."""
        return super().of(variant, preset, **{"filter_layer": preset.paper_layer} | given)

    def check(self, model: "Decoder") -> None:
        """See `Method.check`."""
        super().check(model)
        if self.filter_layer >= model.config.layers:
            raise UserError(
                f"filter layer {self.filter_layer} is out of range; the model has layers 0 to {model.config.layers - 1}"
            )

    @property
    def propagation(self) -> "FastKV":
        """Itself."""
        return self

    @property
    def last_whole_layer(self) -> int:
        """r."""
        return self.filter_layer

    def propagated_slots(self, prompt: int) -> int:
        """See `Propagation`."""
        return max(self._share_of(prompt), self.slots(prompt))

    def propagated(self, visit: "Visit", lengths: "jax.Array") -> "tuple[jax.Array, jax.Array]":
        """See `Propagation`."""
        import jax.numpy as jnp

        from gemfilter_jax.parallel import collectives

        of_all_heads = collectives.psum(self.scores(visit, lengths).sum(axis=1, keepdims=True), "model")
        counts = jnp.maximum(self._share_of(lengths), jnp.minimum(self.keep, lengths)).astype(jnp.int32)
        slots = self.propagated_slots(visit.k.shape[1])
        return self._best(of_all_heads, lengths, keep=counts, slots=slots)[:, 0], counts

    def _share_of(self, length: Any) -> Any:
        """How many of `length` tokens, a number or an array, are the propagated share, rounded up."""
        thousandths = round(self.propagated_share * _STEPS)
        return length // _STEPS * thousandths - (-(length % _STEPS) * thousandths) // _STEPS
