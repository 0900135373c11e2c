"""What happens at a layer of the forward pass besides the layer itself. Axes as in `transformer`."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax


@dataclasses.dataclass(frozen=True)
class Visit:
    """The inputs of the hook and of attention at a layer.

    Attributes:
      layer: its index, may be traced.
      x: [B, S, D], the layer's input.
      q: [B, S, H, E]. k, v: [B, S, G, E]. Queries and keys are rotated.
      sliding_window: how many keys a query sees, its own included; None for all before it. May be traced.
      key_heads: G of the whole model; on a mesh, q, k and v hold this device's heads.
      positions: int [B, S], the positions that a sliding window counts; None for 0 to S - 1.
    """

    layer: jax.typing.ArrayLike
    x: jax.Array
    q: jax.Array
    k: jax.Array
    v: jax.Array
    sliding_window: jax.typing.ArrayLike | None
    key_heads: int
    positions: jax.Array | None = None


Hook = Callable[[Visit, Any], Any]
"""Called at a layer before attention, with the state; returns the new state."""

Attend = Callable[[Visit, Any], jax.Array]
"""Called after the hook, with the new state; returns attention's result [B, S, H, E]."""


class Eviction(Protocol):
    """Which keys and values of a prompt a layer keeps. Hashable, to be a static argument of compiled programs."""

    @property
    def propagation(self) -> "Propagation | None":
        """Which tokens later layers read; None if all layers read the whole prompt."""
        ...

    def slots(self, prompt: int) -> int:
        """How many cache slots a prompt of at most `prompt` tokens takes."""
        ...

    def kept(self, visit: Visit, lengths: jax.Array) -> jax.Array:
        """The kept tokens at a layer.

        Args:
          lengths: [B], number of real tokens in each row.

        Returns:
          int [B, K], or [B, G, K] if key heads keep different tokens, with K = `slots` of the prompt: in each row
          min(K, length) increasing indices into S, then the value S. On a mesh, G counts this device's key heads.
        """
        ...


class Propagation(Protocol):
    """Which tokens of a prompt go on after a layer. Hashable as well."""

    @property
    def last_whole_layer(self) -> int:
        """The last layer that reads the whole prompt."""
        ...

    def propagated_slots(self, prompt: int) -> int:
        """How many tokens of a prompt of at most `prompt` tokens go on, at most."""
        ...

    def propagated(self, visit: Visit, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The tokens whose hidden states go on, by the data of `last_whole_layer`.

        Returns:
          int32 [B, T], T = `propagated_slots(S)`: increasing indices into S, the last real token's among them, then the
          value S; and int32 [B], the number of indices below S, at least min(`Eviction.slots(S)`, length).
        """
        ...
