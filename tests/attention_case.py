"""A circumstance that attention is computed in, with inputs, and the check against float64."""

import dataclasses

import float64_attention
import jax
import jax.numpy as jnp
import numpy as np

from gemfilter_jax.ops.attention import TriShape


@dataclasses.dataclass(frozen=True)
class Attention:
    """One circumstance that attention is computed in.

    Attributes:
      tails: of a tri_shape; None for dense attention. gaps: positions have gaps, which windows must respect.
      large: whole numbers make the logits, up to thousands, exact in float32: only the softmax can err.
    """

    lengths: tuple[int, ...] = (401, 175)
    heads: int = 4
    groups: int = 2
    width: int = 16
    dtype: str = "float32"
    window: int | None = None
    tails: tuple[int, ...] | None = None
    first: int = 0
    band: int = 0
    room: int = 0
    gaps: bool = False
    scale: float | None = None
    soft_cap: float | None = None
    large: bool = False

    @property
    def pattern(self) -> TriShape | None:
        return None if self.tails is None else TriShape(np.asarray(self.tails), self.first, self.band, self.room)

    @property
    def windows_by_position(self) -> bool:
        return self.gaps and self.window is not None

    def inputs(self) -> tuple[jax.Array, jax.Array, jax.Array, np.ndarray]:
        """q, k, v and positions; what lies beyond a row's length is large, to be seen if it leaks."""
        rng = np.random.default_rng(0)
        batch, longest = len(self.lengths), max(self.lengths)
        q = rng.normal(size=(batch, longest, self.heads, self.width))
        k, v = rng.normal(size=(2, batch, longest, self.groups, self.width))
        for row, length in enumerate(self.lengths):
            k[row, length:] = v[row, length:] = 1e4
        if self.large:
            q, k = np.round(q * 20), np.round(np.minimum(k, 5) * 20)
            assert np.abs(np.einsum("be,be->b", q[0, :, 0], k[0, :, 0])).max() / 4 > 1000
        steps = rng.integers(1, 5, (batch, longest)) if self.gaps else np.ones((batch, longest), int)
        q, k, v = (jnp.asarray(x, self.dtype) for x in (q, k, v))
        return q, k, v, np.cumsum(steps, axis=1) - 1

    def check(self, out: jax.Array, slots: np.ndarray) -> None:
        """Compare results [B, R, H, E] for the slots [B, R] of the prompts, negative ones and padding left out."""
        assert out.dtype == self.dtype
        assert jnp.isfinite(out).all()
        unit = float(jnp.finfo(self.dtype).eps) / 2
        q, k, v, positions = self.inputs()
        q, k, v, out = (np.asarray(x.astype(jnp.float32)) for x in (q, k, v, out))
        for row, length in enumerate(self.lengths):
            tri_shape = None if self.tails is None else (self.first, self.band, self.tails[row])
            seen = float64_attention.visible(positions[row, :length], self.window, tri_shape)
            real = (slots[row] >= 0) & (slots[row] < length)
            own, keys = slots[row][real], slice(length)
            asked = (q[row, own], k[row, keys], v[row, keys], seen[own], self.scale, self.soft_cap, unit, self.large)
            want, largest_error = float64_attention.attend(*asked)
            assert (np.abs(out[row][real] - want) <= largest_error).all()
