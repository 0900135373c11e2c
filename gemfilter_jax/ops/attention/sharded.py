"""Attention to prompts that are sharded over the mesh's seq axis, in XLA; see `parallel.shards`."""

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
    """`attention.causal` on this device's shard of q, k and v.

    Under dense attention keys and values pass around all devices (ring attention, Liu et al. 2023, arXiv 2310.01889).
    Under tri_shape a device receives the keys and values of the band from its neighbours, the keys and values of
    the first tokens, and the queries of the last rows. This amount does not depend on S.

    Raises:
      NotImplementedError: positions are given together with a window.
    """
    refuse_positions(positions, window)
    if pattern is None:
        return _round(q, k, v, lengths, window, scale, soft_cap)
    sequence = shards.sequence_shards(mirrored=False)
    first = jnp.arange(min(pattern.first, q.shape[1] * sequence.axis_size))[None].repeat(len(q), axis=0)
    firsts = sequence.rows(k, first), sequence.rows(v, first)
    near_k, near_v = (_behind_neighbours(x, pattern.band - 1, sequence.axis_size) for x in (k, v))
    start = sequence.starts(q.shape[1])[0]
    asked = {"lengths": lengths, "window": window, "pattern": pattern, "scale": scale, "soft_cap": soft_cap}
    out = xla.banded(q, near_k, near_v, firsts, **asked, start=start)
    return xla.with_suffixes(out, q, k, v, **asked)


def _behind_neighbours(x: jax.Array, count: int, axis_size: int) -> jax.Array:
    """x [B, S, ...] preceded by up to `count` positions of the preceding shards; zeros before the prompt's start."""
    length = x.shape[1]
    pieces = [x]
    for hop in range(1, min(-(-count // length), axis_size - 1) + 1):
        wanted = min(count - (hop - 1) * length, length)
        along = [(shard, shard + hop) for shard in range(axis_size - hop)]
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
    sequence, own, length = shards.sequence_shards(mirrored=True), collectives.axis_index("seq"), q.shape[1]
    block, groups = sequence.block(length), k.shape[2]
    repeats = q.shape[2] // groups
    longest = jnp.max(lengths)

    def starts(shard: jax.typing.ArrayLike) -> jax.Array:
        """The first position of each block of a shard."""
        offsets = jnp.arange(0, length // sequence.pieces, block)
        return (sequence.starts(length, shard)[:, None] + offsets).reshape(-1)

    def visited(sums: xla.Sums, keys: jax.Array, values: jax.Array, owner: jax.typing.ArrayLike) -> xla.Sums:
        """The sums of all query blocks, with the keys and values of shard `owner` added."""
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

        return jax.lax.map(of_block, (blocks, starts(own), sums))

    def step(distance, carry):
        keys, values, sums = carry
        onward = [(shard, (shard + 1) % sequence.axis_size) for shard in range(sequence.axis_size)]
        keys, values = (jax.lax.ppermute(x, "seq", onward) for x in (keys, values))
        return keys, values, visited(sums, keys, values, (own - distance) % sequence.axis_size)

    blocks = rearrange(xla.scaled(q, scale), "b (n s) (g r) e -> n b g (r s) e", s=block, g=groups)
    sums = visited(jax.vmap(xla.nothing)(blocks), k, v, own)
    _, _, (acc, peak, mass) = jax.lax.fori_loop(1, sequence.axis_size, step, (k, v, sums))
    seen = (acc, peak, jnp.where(mass == 0, 1, mass))  # rows of padding may have seen no block
    return rearrange(xla.finished(seen, q.dtype), "n b g (r s) e -> b (n s) (g r) e", r=repeats)
