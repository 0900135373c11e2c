"""Full attention."""

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Self

from gemfilter_jax.methods.base import Method

if TYPE_CHECKING:
    from gemfilter_jax.methods.presets import Preset


@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Keep everything: full attention, the baseline."""

    variants: ClassVar[tuple[str, ...]] = ("full",)

    @classmethod
    def of(cls, variant: str, preset: "Preset", **given: Any) -> Self:
        """There is nothing to choose."""
        del variant, preset, given
        return cls()
