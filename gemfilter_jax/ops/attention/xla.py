"""Blockwise attention in plain XLA, on every platform. Only a tri_shape with a window over positions is unsupported."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange

from gemfilter_jax.ops.attention.visibility import TriShape, refuse_positions
from gemfilter_jax.parallel import collectives, shards
from gemfilter_jax.precision import precision_of

_BLOCK = 512  # queries and keys per block: the fastest of 64..1024 on two AVX-512 cores at S = 8192, E = 64
_BAND_BLOCK = 256  # of a tri_shape, at most: half of its band, since keys of a block beyond the band are wasted work
_LEAST_BAND_BLOCK = 64  # smaller products cost more than they save
_BAND_ROWS = 256  # of a tri_shape's queries at a time: the logits of several small blocks in one product
_MASKED = -1e30  # finite, so that a row without any visible key does not yield NaN


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
    """`attention.causal` with an online softmax over blocks of keys (Dao et al. 2022).

    It skips key blocks that no row of a query block sees, and query blocks that hold only padding.

    Raises:
      NotImplementedError: positions are given together with a window and a tri_shape.
    """
    if pattern is not None:
        refuse_positions(positions, window)
        firsts = k[:, : pattern.first], v[:, : pattern.first]
        asked = {"lengths": lengths, "window": window, "pattern": pattern, "scale": scale, "soft_cap": soft_cap}
        return with_suffixes(banded(q, k, v, firsts, **asked), q, k, v, **asked)
    length = q.shape[1]
    block = min(_BLOCK, length)
    q_blocks, k_blocks, v_blocks = (padded(x, block) for x in (scaled(q, scale), k, v))
    positions = None if positions is None or window is None else padded(positions, block)
    return _dense(q_blocks, k_blocks, v_blocks, lengths, block, window, positions, soft_cap)[:, :length]


def scaled(q: jax.Array, scale: float) -> jax.Array:
    """Queries whose inner products with keys are the logits, in q's dtype."""
    return q * jnp.asarray(scale, q.dtype)


def _capped(logits: jax.Array, soft_cap: float | None) -> jax.Array:
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def padded(x: jax.Array, block: int) -> jax.Array:
    """x [B, S, ...], zero-padded at the end to whole blocks."""
    missing = -x.shape[1] % block
    return jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2))) if missing else x


def with_suffixes(
    out: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    lengths: jax.Array,
    window: jax.typing.ArrayLike | None,
    pattern: TriShape,
    scale: float,
    soft_cap: float | None,
) -> jax.Array:
    """The result [B, S, H, E] of a tri_shape's first tokens and band, with dense attention in the last rows."""
    if pattern.room == 0:
        return out
    sequence = shards.sequence_shards(mirrored=False)
    length = q.shape[1]
    room = min(pattern.room, length * sequence.axis_size)
    positions = lengths[:, None] - room + jnp.arange(room)
    dense = rows(sequence.rows(q, positions), positions, k, v, window=window, scale=scale, soft_cap=soft_cap)
    local, here = sequence.local(length, positions)
    in_suffix = positions >= jnp.maximum(lengths - pattern.suffix_lengths, 0)[:, None]
    columns = jnp.where(in_suffix & here, local, length)
    return out.at[jnp.arange(len(out))[:, None], columns].set(dense, mode="drop")


def _dense(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    block: int,
    window: jax.typing.ArrayLike | None,
    positions: jax.Array | None,
    soft_cap: float | None,
) -> jax.Array:
    """Attention of scaled queries in whole blocks; positions must be at least as far apart as their slots."""
    groups, repeats = k.shape[2], q.shape[2] // k.shape[2]
    blocks = rearrange(q, "b (n s) (g r) e -> n b g (r s) e", s=block, g=groups)
    k, v = rearrange(k, "b s g e -> b g s e"), rearrange(v, "b s g e -> b g s e")
    ahead = jnp.tile(jnp.arange(block)[:, None] - jnp.arange(block), (repeats, 1))  # query minus key, in one block

    def between(positions, index, j):
        own, key = (jax.lax.dynamic_slice_in_dim(positions, i * block, block, axis=1) for i in (index, j))
        return jnp.tile(own[:, :, None] - key[:, None], (1, repeats, 1))[:, None]

    def attend(index, queries):
        def accumulate(j, carry, diagonal=False):
            kj = jax.lax.dynamic_slice_in_dim(k, j * block, block, axis=2)
            vj = jax.lax.dynamic_slice_in_dim(v, j * block, block, axis=2)
            distance = ahead + (index - j) * block
            seen = [distance >= 0] if diagonal else []
            if window is not None:
                seen.append((distance if positions is None else between(positions, index, j)) < window)
            return accumulated(queries, kj, vj, seen, carry, soft_cap)

        start = 0 if window is None else jnp.maximum(index * block - window + 1, 0) // block
        carry = jax.lax.fori_loop(start, index, accumulate, nothing(queries))
        return finished(accumulate(index, carry, diagonal=True), q.dtype)

    out = _over_query_blocks(attend, lengths, block, len(blocks), blocks)
    return rearrange(out, "n b g (r s) e -> b (n s) (g r) e", r=repeats)


def banded(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    firsts: tuple[jax.Array, jax.Array],
    *,
    lengths: jax.Array,
    window: jax.typing.ArrayLike | None,
    pattern: TriShape,
    scale: float,
    soft_cap: float | None,
    start: jax.typing.ArrayLike = 0,
) -> jax.Array:
    """Attention to a tri_shape's first tokens and band: a query block sees few keys, so one softmax covers them.

    Args:
      q: [B, S, H, E], for the prompt's positions from `start` on; `start` may be traced.
      k, v: [B, N + S, G, E], for the N positions before `start` too.
      firsts: keys and values [B, F, G, E] of the first tokens.
    """
    length, before = q.shape[1], k.shape[1] - q.shape[1]
    block = min(_BAND_BLOCK, max(pattern.band // 2, _LEAST_BAND_BLOCK), length)
    together = max(min(_BAND_ROWS, length) // block, 1)
    step = together * block
    q, k, v = (jnp.pad(x, ((0, 0), (0, -length % step), (0, 0), (0, 0))) for x in (q, k, v))
    first, repeats = firsts[0].shape[1], q.shape[2] // k.shape[2]
    span = min(-(-(pattern.band - 1) // block) * block + block, k.shape[1])
    near = pattern.band if window is None else jnp.minimum(window, pattern.band)
    blocks = jnp.arange(together)

    def attend(index, queries):
        queries = rearrange(scaled(queries, scale), "b (n s) (g r) e -> b n g (r s) e", n=together, r=repeats)
        begins = jnp.maximum(before + (index * together + blocks + 1) * block - span, 0)

        def seen(x, first_x):
            bands = (jax.lax.dynamic_slice_in_dim(x, begins[i], span, axis=1) for i in range(together))
            of_blocks = jnp.stack([jnp.concatenate([first_x, band], axis=1) for band in bands], axis=1)
            return rearrange(of_blocks, "b n k g e -> b n g k e")

        keys, values = seen(k, firsts[0]), seen(v, firsts[1])
        in_bands = start - before + begins[:, None] + jnp.arange(span)
        in_firsts = jnp.broadcast_to(jnp.arange(first), (together, first))
        places = jnp.concatenate([in_firsts, in_bands], axis=1)[:, None]
        distance = start + index * step + jnp.arange(step).reshape(together, block, 1) - places
        in_band = (distance >= 0) & (distance < near) & (places >= 0)
        far = distance >= near if window is None else (distance >= near) & (distance < window)
        bias = jnp.where(jnp.where(jnp.arange(first + span) < first, far, in_band), 0.0, _MASKED)
        products = functools.partial(jnp.einsum, precision=precision_of(queries), preferred_element_type=jnp.float32)
        logits = _capped(products("bngqe,bngke->bngqk", queries, keys), soft_cap)
        logits = rearrange(logits, "b n g (r s) k -> b n g r s k", r=repeats) + bias[:, None, None]
        mass = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
        total = rearrange(mass.sum(axis=-1), "b n g r s -> b n g (r s) 1")
        mass = rearrange(mass.astype(v.dtype), "b n g r s k -> b n g (r s) k")
        summed = products("bngqk,bngke->bngqe", mass, values)
        return rearrange((summed / total).astype(q.dtype), "b n g (r s) e -> b (n s) (g r) e", r=repeats)

    def replace(index, out):
        """A block's queries are not needed after it, so that its result takes their place."""
        queries = jax.lax.dynamic_slice_in_dim(out, index * step, step, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(out, attend(index, queries), index * step, axis=1)

    steps = jnp.clip(-(-(jnp.max(lengths) - start) // step), 0, q.shape[1] // step)
    return jax.lax.fori_loop(0, steps, replace, q)[:, :length]


def _over_query_blocks(
    attend: Callable[..., jax.Array], lengths: jax.Array, block: int, count: int, *blocks: jax.Array
) -> jax.Array:
    """attend(index, *block) for each of `count` query blocks, stacked; zeros for blocks that hold only padding."""
    last = (jnp.max(lengths) - 1) // block

    def attend_unless_padding(numbered):
        nothing = jax.eval_shape(attend, *numbered)
        zeros = functools.partial(jnp.zeros, nothing.shape, nothing.dtype)
        return jax.lax.cond(numbered[0] <= last, attend, lambda *_: zeros(), *numbered)

    return jax.lax.map(attend_unless_padding, (jnp.arange(count), *blocks))


Sums = tuple[jax.Array, jax.Array, jax.Array]  # online softmax state: weighted values, largest logit, total mass


def nothing(queries: jax.Array) -> Sums:
    """The sums before any key is seen, for queries [B, G, Q, E]."""
    shape = queries.shape[:-1]
    return jnp.zeros(queries.shape, jnp.float32), jnp.full(shape, _MASKED), jnp.zeros(shape, jnp.float32)


def accumulated(
    queries: jax.Array, k: jax.Array, v: jax.Array, seen: list[jax.Array], sums: Sums, soft_cap: float | None
) -> Sums:
    """Add keys and values [B, G, K, E] where every mask in `seen`, broadcast to [B, G, Q, K], is true."""
    acc, peak, total = sums
    precision = precision_of(queries)
    logits = jnp.einsum("bgqe,bgke->bgqk", queries, k, precision=precision, preferred_element_type=jnp.float32)
    logits = _capped(logits, soft_cap)
    for visible in seen:
        logits = jnp.where(visible, logits, _MASKED)
    new_peak = jnp.maximum(peak, logits.max(axis=-1))
    mass = jnp.exp(logits - new_peak[..., None])
    decay = jnp.exp(peak - new_peak)
    update = jnp.einsum(
        "bgqk,bgke->bgqe", mass.astype(v.dtype), v, precision=precision, preferred_element_type=jnp.float32
    )
    return acc * decay[..., None] + update, new_peak, total * decay + mass.sum(axis=-1)


def finished(sums: Sums, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The attention output of final sums; every row must have seen a block."""
    acc, _, total = sums
    return (acc / total[..., None]).astype(dtype)


def _of_all_parts(sums: Sums) -> Sums:
    """The sums over all keys, merged from each device's sums over its shard."""
    acc, peak, total = sums
    highest = collectives.pmax(peak, "seq")
    share = jnp.exp(peak - highest)
    return collectives.psum(acc * share[..., None], "seq"), highest, collectives.psum(total * share, "seq")


def rows(
    q: jax.Array,
    positions: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    key_positions: jax.Array | None = None,
    window: jax.typing.ArrayLike | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Dense causal attention of some rows of a sequence, blockwise over its keys.

    Args:
      q: [B, R, H, E]. positions: int [B, R], the rows' positions in the sequence. k, v: [B, S, G, E]; if sequences are
        sharded, this device's shard, not mirrored.
      key_positions: int [B, S], the keys' positions, -1 for an empty slot; all slots are then visited. None if the
        whole sequence's keys are in order from position 0.
      window, scale, soft_cap: as in `attention.causal`.

    Returns:
      [B, R, H, E] in q's dtype; rows at negative positions are unspecified but finite.
    """
    with jax.named_scope("attention_rows"):
        groups, repeats = k.shape[2], q.shape[2] // k.shape[2]
        block = min(_BLOCK, k.shape[1])
        own = positions
        if key_positions is None:
            own = positions - shards.sequence_shards(mirrored=False).starts(k.shape[1])
        else:
            key_positions = jnp.pad(key_positions, ((0, 0), (0, -k.shape[1] % block)), constant_values=-1)
        k, v = padded(k, block), padded(v, block)
        queries = scaled(q, q.shape[-1] ** -0.5 if scale is None else scale)
        queries = rearrange(queries, "b s (g r) e -> b g (r s) e", g=groups)
        of_queries = jnp.tile(own, (1, repeats))[:, None, :, None]

        def accumulate(j, sums):
            if key_positions is None:
                distance = of_queries - (j * block + jnp.arange(block))
                seen = [distance >= 0]
            else:
                at = jax.lax.dynamic_slice_in_dim(key_positions, j * block, block, axis=1)[:, None, None]
                distance = of_queries - at
                seen = [(distance >= 0) & (at >= 0)]
            if window is not None:
                seen.append(distance < window)
            kj, vj = (
                rearrange(jax.lax.dynamic_slice_in_dim(x, j * block, block, axis=1), "b s g e -> b g s e")
                for x in (k, v)
            )
            return accumulated(queries, kj, vj, seen, sums, soft_cap)

        blocks = k.shape[1] // block
        if key_positions is None:
            blocks = jnp.minimum(jnp.max(own) // block + 1, blocks)
        out = finished(_of_all_parts(jax.lax.fori_loop(0, blocks, accumulate, nothing(queries))), q.dtype)
        return rearrange(out, "b g (r s) e -> b s (g r) e", r=repeats)


def to_cache(
    q: jax.Array,
    positions: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    key_positions: jax.Array,
    window: jax.typing.ArrayLike | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Attention of one new token per row to a KV cache, whose slots may hold any positions in any order.

    A query is multiplied with the keys of all heads, zeros in place of the others: so the cache is read as it lies, in
    two products, while a product for each head would copy it first.

    Args:
      q: [B, 1, H, E]. positions: int [B], the new tokens' positions. k, v: [B, C, G, E], the new tokens' included.
      key_positions: int [B, C], or [B, G, C] if key heads hold different tokens; -1 for an empty slot.
      window, scale, soft_cap: as in `attention.causal`.

    Returns:
      [B, 1, H, E] in q's dtype; rows that see no key are unspecified but finite.
    """
    with jax.named_scope("attention"):
        groups = k.shape[2]
        products = functools.partial(jnp.einsum, precision=precision_of(q), preferred_element_type=jnp.float32)
        own = jnp.eye(groups, dtype=q.dtype)[:, None, :, None]  # [G, 1, G, 1]
        queries = scaled(q[:, 0], q.shape[-1] ** -0.5 if scale is None else scale)
        queries = rearrange(queries, "b (g r) e -> b g r 1 e", g=groups) * own
        k, v = (rearrange(x, "b c g e -> b c (g e)") for x in (k, v))
        logits = products("bhd,bcd->bhc", rearrange(queries, "b g r h e -> b (g r) (h e)"), k)
        logits = rearrange(logits, "b (g r) c -> b g r c", g=groups)
        key_positions = key_positions[:, None] if key_positions.ndim == 2 else key_positions
        distance = positions[:, None, None] - key_positions
        visible = (key_positions >= 0) & (distance >= 0)
        if window is not None:
            visible &= distance < window
        masked = jnp.where(visible[:, :, None], _capped(logits, soft_cap), _MASKED)
        weights = rearrange(jax.nn.softmax(masked, axis=-1), "b g r c -> b (g r) c")
        out = products("bhc,bcd->bhd", weights.astype(v.dtype), v)
        out = (rearrange(out, "b (g r) (h e) -> b g r h e", g=groups, h=groups) * own).sum(axis=3)
        return rearrange(out, "b g r e -> b 1 (g r) e").astype(q.dtype)
