"""Causal attention on NVIDIA GPUs (Pallas through Triton), with a tri_shape's first tokens, band and dense last rows.

Axes as in `models.transformer`. A thread block holds a block of queries of one head, and visits the key blocks that any
of them sees with an online softmax (Dao et al. 2022). The kernel compiles for compute capabilities 8.0 and 9.0 and is
correct in Pallas' interpreter; it has not run on a GPU yet.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

_QUERIES, _KEYS = 128, 64  # per block
_WIDE = 128  # head widths above it take half as many queries, so that their sums stay in registers
_LEAST = 16  # rows and columns of a tensor core's product
_MASKED = -1e30  # finite, so that a row that has seen no key yet does not yield NaN


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    limits: jax.Array,
    *,
    first: int,
    scale: float,
    soft_cap: float | None,
    interpret: bool = False,
) -> jax.Array:
    """Attention [B, S, H, E] in q's dtype; zeros for blocks of padding.

    Args:
      q: [B, S, H, E]. k, v: [B, S, G, E].
      limits: int32 [B, 4]: the length; the first row that sees all keys before it; how many of the nearest keys the
        rows before that see, their own included; how far back any row sees.
      first: number of keys at the start that every row sees, within that last limit.
      scale, soft_cap: as in `attention.causal`.
      interpret: run the kernel step by step in XLA, on any platform.
    """
    batch, length, heads, width = q.shape
    columns = max(pl.next_power_of_2(width), _LEAST)
    queries = min(_QUERIES if columns <= _WIDE else _QUERIES // 2, max(pl.next_power_of_2(length), _LEAST))
    q, k, v = (jnp.pad(x, ((0, 0), (0, -length % queries), (0, 0), (0, 0))) for x in (q, k, v))
    rows, repeats = q.shape[1], heads // k.shape[2]
    blocks = rows // queries
    # The last blocks come first: rows that see all keys take the longest.
    own = pl.BlockSpec((None, queries, None, columns), lambda head, i, row: (row, blocks - 1 - i, head, 0))
    keys = pl.BlockSpec((None, rows, None, columns), lambda head, i, row: (row, 0, head // repeats, 0))
    out = pl.pallas_call(
        functools.partial(_attend, blocks=blocks, width=width, first=first, scale=scale, soft_cap=soft_cap),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(heads, blocks, batch),  # the heads that share keys run side by side
        in_specs=[pl.BlockSpec((None, 4), lambda head, i, row: (row, 0)), own, keys, keys],
        out_specs=own,
        compiler_params=plgpu.CompilerParams(num_warps=4 if columns < _WIDE else 8, num_stages=2),
        interpret=interpret,
    )(limits, q, k, v)
    return out[:, :length]


def _attend(limits_ref, q_ref, k_ref, v_ref, out_ref, *, blocks, width, first, scale, soft_cap):
    queries, columns = q_ref.shape
    block = min(_KEYS, queries)
    start = (blocks - 1 - pl.program_id(1)) * queries
    length, dense, near, far = (limits_ref[index] for index in range(4))
    real_columns = (jnp.arange(columns) < width)[None]
    q = plgpu.load(q_ref, mask=real_columns, other=0.0)
    row = start + jnp.arange(queries)[:, None]

    reach = jnp.where(start + queries > dense, far, near)
    begin = jax.lax.div(jnp.maximum(start - reach + 1, 0), block)
    at_start = jnp.minimum(pl.cdiv(first, block), begin)
    visits = jnp.where(start < length, at_start + jax.lax.div(start + queries, block) - begin, 0)

    def visit(index, sums):
        acc, peak, total = sums
        place = jnp.where(index < at_start, index, index - at_start + begin) * block
        k, v = (plgpu.load(ref.at[pl.ds(place, block)], mask=real_columns, other=0.0) for ref in (k_ref, v_ref))
        logits = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32) * scale
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        key = place + jnp.arange(block)[None]
        distance = row - key
        seen = (distance >= 0) & ((distance < near) | ((distance < far) & ((key < first) | (row >= dense))))
        logits = jnp.where(seen, logits * math.log2(math.e), _MASKED)
        new_peak = jnp.maximum(peak, logits.max(axis=1))
        mass = jnp.exp2(logits - new_peak[:, None])
        decay = jnp.exp2(peak - new_peak)
        update = jnp.dot(mass.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return acc * decay[:, None] + update, new_peak, total * decay + mass.sum(axis=1)

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full((queries,), _MASKED), jnp.zeros((queries,), jnp.float32)
    acc, _, total = jax.lax.fori_loop(0, visits, visit, nothing)
    out = acc / jnp.where(total == 0, 1.0, total)[:, None]
    plgpu.store(out_ref, out.astype(out_ref.dtype), mask=real_columns)
