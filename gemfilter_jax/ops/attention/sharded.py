"""Attention to prompts that are cut over the mesh's seq axis, in XLA; see `parallel.shards`."""

import jax
import jax.numpy as jnp
from einops import rearrange

from gemfilter_jax.ops.attention import xla
from gemfilter_jax.ops.attention.visibility import TriShape, refuse_positions
from gemfilter_jax.parallel import collectives, shards


def causal(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    lengths: jax.Array,
    window: jax.typing.ArrayLike | None,
    pattern: TriShape | None,
    positions: jax.Array | None,
    scale: float,
    soft_cap: float | None,
) -> jax.Array:
    """`attention.causal` of this device's part of q, k and v.

    Under dense attention keys and values go round all devices (ring attention, Liu et al. 2023, arXiv 2310.01889).
    Under tri_shape a device receives the band's keys from its neighbours, the first tokens' and the last rows'
    queries: as much whatever S is.

    Raises:
      NotImplementedError: positions are given together with a window.
    """
    refuse_positions(positions, window)
    if pattern is None:
        return _round(q, k, v, lengths, window, scale, soft_cap)
    cut = shards.cut(mirrored=False)
    first = jnp.arange(min(pattern.first, q.shape[1] * cut.parts))[None].repeat(len(q), axis=0)
    firsts = cut.rows(k, first), cut.rows(v, first)
    near_k, near_v = (_behind_neighbours(x, pattern.band - 1, cut.parts) for x in (k, v))
    start = cut.starts(q.shape[1])[0]
    asked = {"lengths": lengths, "window": window, "pattern": pattern, "scale": scale, "soft_cap": soft_cap}
    out = xla.banded(q, near_k, near_v, firsts, **asked, start=start)
    return xla.with_tails(out, q, k, v, **asked)


def _behind_neighbours(x: jax.Array, count: int, parts: int) -> jax.Array:
    """x [B, S, ...] behind the last `count` positions, or as many as others have, before it; zeros before the first."""
    length = x.shape[1]
    pieces = [x]
    for hop in range(1, min(-(-count // length), parts - 1) + 1):
        wanted = min(count - (hop - 1) * length, length)
        along = [(part, part + hop) for part in range(parts - hop)]
        pieces.insert(0, jax.lax.ppermute(x[:, length - wanted :], "seq", along))
    return jnp.concatenate(pieces, axis=1)


def _round(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    window: jax.typing.ArrayLike | None,
    scale: float,
    soft_cap: float | None,
) -> jax.Array:
    cut, part, length = shards.cut(mirrored=True), collectives.axis_index("seq"), q.shape[1]
    block, groups = cut.block(length), k.shape[2]
    repeats = q.shape[2] // groups
    longest = jnp.max(lengths)

    def starts(part: jax.typing.ArrayLike) -> jax.Array:
        """Where the blocks of a part begin."""
        offsets = jnp.arange(0, length // cut.pieces, block)
        return (cut.starts(length, part)[:, None] + offsets).reshape(-1)

    def visited(sums: xla.Sums, keys: jax.Array, values: jax.Array, owner: jax.typing.ArrayLike) -> xla.Sums:
        """The sums of all query blocks, with another part's keys and values seen."""
        key_starts = starts(owner)

        def of_block(inputs):
            queries, start, sums = inputs

            def see(j, sums):
                distance = start - key_starts[j] + jnp.arange(block)[:, None] - jnp.arange(block)
                distance = jnp.tile(distance, (repeats, 1))
                seen = [distance >= 0] if window is None else [distance >= 0, distance < window]
                kj, vj = (
                    rearrange(jax.lax.dynamic_slice_in_dim(x, j * block, block, axis=1), "b s g e -> b g s e")
                    for x in (keys, values)
                )
                return xla.accumulated(queries, kj, vj, seen, sums, soft_cap)

            def see_if_visible(j, sums):
                visible = (key_starts[j] <= start) & (start < longest)
                if window is not None:
                    visible &= start - key_starts[j] - block + 1 < window
                return jax.lax.cond(visible, see, lambda _, sums: sums, j, sums)

            return jax.lax.fori_loop(0, len(key_starts), see_if_visible, sums)

        return jax.lax.map(of_block, (blocks, starts(part), sums))

    def step(distance, carry):
        keys, values, sums = carry
        onward = [(part, (part + 1) % cut.parts) for part in range(cut.parts)]
        keys, values = (jax.lax.ppermute(x, "seq", onward) for x in (keys, values))
        return keys, values, visited(sums, keys, values, (part - distance) % cut.parts)

    blocks = rearrange(xla.scaled(q, scale), "b (n s) (g r) e -> n b g (r s) e", s=block, g=groups)
    sums = visited(jax.vmap(xla.nothing)(blocks), k, v, part)
    _, _, (acc, peak, mass) = jax.lax.fori_loop(1, cut.parts, step, (k, v, sums))
    seen = (acc, peak, jnp.where(mass == 0, 1, mass))  # rows of padding may have seen no block
    return rearrange(xla.finished(seen, q.dtype), "n b g (r s) e -> b (n s) (g r) e", r=repeats)
