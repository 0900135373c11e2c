"""Full attention."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from gemfilter_jax.methods.base import Method


@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Keep everything: full attention, the baseline."""

    variants: ClassVar[Mapping[str, str]] = {"full": "full attention"}
