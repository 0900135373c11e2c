"""Selection scores on TPU (Mosaic): keys stream through VMEM in blocks, and no [H, W, S] array is made in HBM.

Axes as in `ops.key_scores`; R = H / G query heads per key head. W is padded to whole sublanes. Keys are read as [G, E,
block]. XLA already stores the rotated keys with the sequence last, so this needs no copy, and because E is a whole axis
Mosaic takes any E.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gemfilter_jax.precision import precision_of

_LANES, _SUBLANES = 128, 8
_VMEM = 12 * 2**20  # bytes that a kernel plans to fill; Mosaic's own limit is 16 MiB
_LARGEST_BLOCK = 1024  # keys
_MASKED = -1e30  # finite, so that a row that has seen no key yet does not yield NaN


def masses(
    q: jax.Array,
    rows: jax.Array,
    k: jax.Array,
    head_weights: jax.Array,
    *,
    from_sink: bool,
    window: jax.typing.ArrayLike | None,
    scale: float,
    largest_exponent: float,
    merge: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """exp(logit - reference) of every key, summed over rows and weighted heads; arguments as in `ops.key_scores`.

    The reference is a row's log-sum-exp over the keys it sees, or over key 0 alone (`from_sink`).

    Args:
      merge: turns references [B, ...] over k into references over all shards' keys; None if k has all keys.

    Raises:
      NotImplementedError: q and k are not both bfloat16 or both float32, or no block of 128 keys fits in VMEM.
    """
    if q.dtype != k.dtype or k.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"queries {q.dtype} and keys {k.dtype}; both must be bfloat16 or both float32")
    length, groups = k.shape[1], k.shape[2]
    repeats = q.shape[2] // groups
    padding = -q.shape[1] % _SUBLANES
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    rows = jnp.pad(rows.astype(jnp.int32), ((0, 0), (0, padding)), constant_values=-1)
    weights = jnp.atleast_2d(head_weights.astype(jnp.float32))
    queries = rearrange(q, "b w (g r) e -> b g (r w) e", g=groups)
    block = _block(queries, weights, length)

    first = jnp.where(rows < 0, length, 0 if window is None else rows - window + 1)
    keys = rearrange(k, "b s g e -> b g e s")
    seen = repeat(jnp.stack([first, rows], axis=-1), "b w two -> b (r w) two", r=repeats)
    blocks = jnp.maximum(jnp.stack([first.min(axis=1), rows.max(axis=1)], axis=1), 0) // block
    to_reference = (jnp.zeros_like(blocks), jnp.zeros_like(seen)) if from_sink else (blocks, seen)
    reference = _call(functools.partial(_log_sum_exp, scale=scale), *to_reference, queries, keys, block=block)
    reference = reference if merge is None else merge(reference)
    kernel = functools.partial(_masses, scale=scale, largest_exponent=largest_exponent)
    scores = _call(kernel, blocks, seen, queries, keys, reference, weights, block=block)
    return scores if head_weights.ndim == 2 else scores[:, 0]


def _block(queries: jax.Array, weights: jax.Array, length: int) -> int:
    """Keys per block, for queries [B, G, R * W, E] and weights [N, H]."""
    _, groups, rows, width = queries.shape
    column = rows * _LANES * 4  # one value per row fills all lanes
    fixed = (6 * groups + 2) * column + 2 * groups * rows * pl.cdiv(width, _LANES) * _LANES * queries.dtype.itemsize
    a_key = 2 * groups * width * queries.dtype.itemsize + (4 * rows + 2 * len(weights) + weights.shape[1]) * 4
    fitting = (_VMEM - fixed) // a_key // _LANES * _LANES
    if fitting < _LANES:
        raise NotImplementedError(f"{groups * rows} rows and {groups} x {width} keys leave no room in VMEM")
    return min(_LARGEST_BLOCK, fitting, length)


def _call(kernel, blocks, seen, queries, keys, reference=None, weights=None, *, block):
    """Run a kernel over [B, blocks of keys].

    Args:
      blocks: int32 [B, 2], first and last block that any row sees; no block outside them is read.
      seen: int32 [B, R * W, 2], first and last key that each row sees.
      queries: [B, G, R * W, E]. keys: [B, G, E, S].
      reference: float32 [B, G, R * W, 1], and weights: float32 [N, H]; give both or neither.

    Returns:
      float32 [B, N, S] with weights, else [B, G, R * W, 1].
    """
    batch, groups, rows, width = queries.shape
    length = keys.shape[-1]
    column = (batch, groups, rows, 1)

    def whole(shape):
        return pl.BlockSpec((None, *shape[1:]), lambda b, i, blocks: (b, *(0 for _ in shape[1:])))

    def key_block(b, i, blocks):
        return b, 0, 0, jnp.clip(i, blocks[b, 0], blocks[b, 1])

    operands = [seen, queries, keys]
    in_specs = [whole(seen.shape), whole(queries.shape), pl.BlockSpec((None, groups, width, block), key_block)]
    if weights is None:
        out_shape, out_spec = column, whole(column)
        scratch = [pltpu.VMEM(column[1:], jnp.float32)] * 2
    else:
        operands += [reference, weights]
        in_specs += [whole(column), pl.BlockSpec(weights.shape, lambda b, i, blocks: (0, 0))]
        out_shape = (batch, len(weights), length)
        out_spec = pl.BlockSpec((None, len(weights), block), lambda b, i, blocks: (b, 0, i))
        scratch = [pltpu.VMEM((weights.shape[1], block), jnp.float32)]
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(out_shape, jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, pl.cdiv(length, block)),
            in_specs=in_specs,
            out_specs=out_spec,
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
    )(blocks, *operands)


def _logits(seen_ref, q_ref, k_ref, group, scale):
    """One group's logits, float32 [R * W, block], and the bool mask of the keys that each row sees."""
    queries, keys = q_ref[group], k_ref[group]
    products = jax.lax.dot(queries, keys, precision=precision_of(keys), preferred_element_type=jnp.float32)
    position = pl.program_id(1) * keys.shape[1] + jax.lax.broadcasted_iota(jnp.int32, products.shape, 1)
    return products * scale, (position >= seen_ref[:, :1]) & (position <= seen_ref[:, 1:])


def _any_row_sees(blocks_ref):
    b, i = pl.program_id(0), pl.program_id(1)
    return (i >= blocks_ref[b, 0]) & (i <= blocks_ref[b, 1])


def _log_sum_exp(blocks_ref, seen_ref, q_ref, k_ref, out_ref, peak_ref, total_ref, *, scale):
    @pl.when(pl.program_id(1) == 0)
    def _():
        peak_ref[...] = jnp.full_like(peak_ref, _MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(_any_row_sees(blocks_ref))
    def _():
        for group in range(len(q_ref)):
            logits, seen = _logits(seen_ref, q_ref, k_ref, group, scale)
            logits = jnp.where(seen, logits, _MASKED)
            old = peak_ref[group]
            peak = jnp.maximum(old, logits.max(axis=1, keepdims=True))
            total = jnp.exp(logits - peak).sum(axis=1, keepdims=True)
            total_ref[group] = total_ref[group] * jnp.exp(old - peak) + total
            peak_ref[group] = peak

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = peak_ref[...] + jnp.log(total_ref[...])


def _masses(
    blocks_ref, seen_ref, q_ref, k_ref, reference_ref, weights_ref, out_ref, of_heads_ref, *, scale, largest_exponent
):
    reads = _any_row_sees(blocks_ref)

    @pl.when(reads)
    def _():
        groups, rows, _ = q_ref.shape
        repeats = len(of_heads_ref) // groups
        for group in range(groups):
            logits, seen = _logits(seen_ref, q_ref, k_ref, group, scale)
            relative = jnp.minimum(logits - reference_ref[group], largest_exponent)
            mass = jnp.where(seen, jnp.exp(relative), 0.0).reshape(repeats, rows // repeats, -1)
            of_heads_ref[group * repeats : (group + 1) * repeats] = mass.sum(axis=1)
        out_ref[...] = jax.lax.dot(weights_ref[...], of_heads_ref[...], precision=jax.lax.Precision.HIGHEST)

    @pl.when(~reads)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)
