"""Selection scores on NVIDIA Hopper (Mosaic GPU): keys stream through shared memory, and no [H, W, S] array is made.

Axes as in `ops.key_scores`; R = H / G query heads per key head; M is R * W, padded to whole chunks of 64 rows. A thread
block holds the rows of one key head, and asynchronous copies load its span of the keys in blocks of 64. Products use
`wgmma`, which Blackwell does not have. The kernels compile for an H100, are correct in Mosaic GPU's interpreter, and
have been timed on an H200; their results have not been compared there yet.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gemfilter_jax.parallel import collectives

_ROWS = _BLOCK = 64  # rows and keys per `wgmma` product
_MOST_BUFFERS = 4  # key blocks in flight or in use
_THREAD_BLOCKS = 512  # at least, given as many key blocks: about two waves of two per SM on 132 SMs
_SHARED_MEMORY = 224 * 2**10  # bytes per SM that thread blocks plan to fill; the limit is 227 KiB
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

    The reference is a row's log-sum-exp over the keys it sees, or its logit with key 0 (`from_sink`).

    Args:
      merge: turns references [B, ...] over k into references over all shards' keys; None if k has all keys.

    Raises:
      NotImplementedError: the GPU is not a Hopper, q and k are not both bfloat16 or both float16, E is not a multiple
        of 16, or rows and weightings leave no room for keys in shared memory.
    """
    weights = jnp.atleast_2d(head_weights.astype(jnp.float32))
    _refuse_what_cannot_be_served(q, k, len(weights))
    length, groups = k.shape[1], k.shape[2]
    k = jnp.pad(k, ((0, 0), (0, -length % _BLOCK), (0, 0), (0, 0)))  # asynchronous copies take whole blocks
    repeats = q.shape[2] // groups
    queries = _padded(rearrange(q, "b w (g r) e -> b g (r w) e", g=groups), axis=2)
    first = jnp.where(rows < 0, length, 0 if window is None else rows - window + 1)
    seen = jnp.stack([first, rows], axis=1).astype(jnp.int32)
    blocks = jnp.stack([seen[:, 0].min(axis=1), seen[:, 1].max(axis=1)], axis=1).clip(0) // _BLOCK
    seen = _padded(repeat(seen, "b two w -> b g two (r w)", g=groups, r=repeats), fill=-1)
    row_weights = repeat(weights, "n (g r) -> b g n (r w)", b=len(q), g=groups, w=q.shape[1])

    if from_sink:
        sink = k[:, 0].astype(jnp.float32)
        logits = jnp.einsum("bgme,bge->bgm", queries.astype(jnp.float32), sink, precision="highest")
        reference = logits * scale
    else:
        of_spans = (len(k), _spans(k), *queries.shape[1:3])
        kernel = functools.partial(_log_sum_exp, scale=scale)
        reference = jax.nn.logsumexp(_call(kernel, of_spans, blocks, k, queries, seen), axis=1)
    reference = reference if merge is None else merge(reference)
    to_sum = jnp.concatenate([reference[:, :, None], _padded(row_weights)], axis=2)
    of_groups = (len(k), groups, len(weights), k.shape[1])
    kernel = functools.partial(_masses, scale=scale, largest_exponent=largest_exponent)
    scores = _call(kernel, of_groups, blocks, k, queries, seen, to_sum).sum(axis=1)[..., :length]
    block = jnp.arange(length) // _BLOCK
    written = (block >= blocks[:, :1]) & (block <= blocks[:, 1:])
    scores = jnp.where(written[:, None], scores, 0.0)
    return scores if head_weights.ndim == 2 else scores[:, 0]


def _refuse_what_cannot_be_served(q: jax.Array, k: jax.Array, weightings: int) -> None:
    if q.dtype != k.dtype or k.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"queries {q.dtype} and keys {k.dtype}; both must be bfloat16 or both float16")
    capability = collectives.compute_capability()
    if capability is not None and not capability.startswith("9."):
        raise NotImplementedError(f"compute capability {capability}; the kernels need 9.0")
    width = k.shape[-1]
    if width % 16:
        raise NotImplementedError(f"heads of {width}; their width must be a multiple of 16")
    rows = pl.cdiv(q.shape[1] * q.shape[2] // k.shape[2], _ROWS) * _ROWS
    if _buffers(rows, width, weightings) < 2 or weightings > 255:
        raise NotImplementedError(f"{rows} rows a key head and {weightings} weightings leave no room in shared memory")


def _buffers(rows: int, width: int, weightings: int) -> int:
    """Key blocks to buffer beside M rows: as many as fit with two thread blocks per SM, or with one if that is < 2."""
    kept = rows * width * 2 + ((3 + weightings) * rows + weightings * _BLOCK) * 4
    of_two, of_one = ((memory - kept) // (_BLOCK * width * 2) for memory in (_SHARED_MEMORY // 2, _SHARED_MEMORY))
    return min(_MOST_BUFFERS, of_two if of_two >= 2 else of_one)


def _padded(x: jax.Array, axis: int = -1, fill: int = 0) -> jax.Array:
    """[..., R * W, ...] -> [..., M, ...], with M the next multiple of _ROWS."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % _ROWS)
    return jnp.pad(x, padding, constant_values=fill)


def _span(k: jax.Array) -> int:
    """How many key blocks a thread block scores."""
    batch, length, groups, _ = k.shape
    return max(1, batch * groups * pl.cdiv(length, _BLOCK) // _THREAD_BLOCKS)


def _spans(k: jax.Array) -> int:
    return pl.cdiv(pl.cdiv(k.shape[1], _BLOCK), _span(k))


def _call(kernel, out_shape, blocks, k, queries, *operands):
    """Run a kernel over [B, spans, G].

    Args:
      blocks: int32 [B, 2], first and last block that any row sees; no block outside them is read or written.
      k: [B, S, G, E]. queries: [B, G, M, E].
      operands: held in shared memory beside the queries: int32 [B, G, 2, M], first and last key that each row sees,
        and for `_masses` float32 [B, G, 1 + N, M], each row's reference and weights.
    """
    groups, width = k.shape[2:]
    operands = [rearrange(x, "b g n (c m) -> b g n c m", m=_ROWS) for x in operands]  # copies take axes of at most 256
    kept = [plgpu.SMEM(queries.shape[2:], queries.dtype, transforms=_transforms(width))]
    kept += [plgpu.SMEM(x.shape[2:], x.dtype) for x in operands]
    scores = [] if len(operands) == 1 else [plgpu.SMEM((out_shape[2], _BLOCK), jnp.float32)]
    buffers = _buffers(queries.shape[2], width, weightings=out_shape[2] if scores else 0)
    return plgpu.kernel(
        functools.partial(_run, kernel, span=_span(k), buffers=buffers),
        out_type=jax.ShapeDtypeStruct(out_shape, jnp.float32),
        scratch_types=(kept, plgpu.Barrier(num_arrivals=len(kept)), scores),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(len(k), _spans(k), groups),
        grid_names=("batch", "span", "group"),
    )(blocks, k, queries, *operands)


def _transforms(width: int) -> tuple:
    """The shared-memory layout of 16-bit values [..., E]."""
    swizzle = math.gcd(width * 2, 128)
    tiling = plgpu.TilingTransform((8, swizzle // 2))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]


def _place():
    """This thread block's indices: prompt, span and key head."""
    return tuple(jax.lax.axis_index(name) for name in ("batch", "span", "group"))


def _run(kernel, blocks_ref, k_ref, *refs, span, buffers):
    """Copy the operands to shared memory, then run `kernel(over_blocks, out_ref, *kept, *scores)`."""
    *from_refs, out_ref, kept, arrived, scores = refs
    b, s, g = _place()
    for source, destination in zip(from_refs, kept, strict=True):
        plgpu.copy_gmem_to_smem(source.at[b, g], destination, arrived)
    plgpu.barrier_wait(arrived)
    first = jnp.maximum(s * span, blocks_ref[b, 0])
    count = jnp.maximum(jnp.minimum((s + 1) * span, blocks_ref[b, 1] + 1) - first, 0)
    width = k_ref.shape[-1]
    keys = plgpu.BlockSpec((None, _BLOCK, None, width), lambda i: (b, first + i, g, 0), transforms=_transforms(width))

    def over_blocks(body, carry=None):
        """Run `body(index, [_BLOCK, E] keys[, carry])` over the blocks of the span that any row sees."""
        return plgpu.emit_pipeline(
            lambda indices, *args: body(first + indices[0], *args),
            grid=(count,),
            in_specs=[keys],
            max_concurrent_steps=buffers,
            init_carry=carry,
        )(k_ref)

    kernel(over_blocks, out_ref, *kept, *scores)


def _product(a_ref, b_ref):
    """float32 [64, 64], the product of [64, E] and the transpose of [64, E]."""

    def multiply(sum_ref):
        plgpu.wgmma(sum_ref, a_ref, b_ref.transpose((1, 0)))
        return sum_ref[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((_ROWS, _BLOCK), jnp.float32))


def _wide(row_values, axis):
    """Broadcast one value per row to [64, 64], with rows along `axis`."""
    return jax.lax.broadcast_in_dim(row_values, (_ROWS, _BLOCK), (axis,))


def _seen(seen_ref, chunk, block, rows_axis):
    """bool [64, 64]: whether a row sees a key."""
    keys = plgpu.broadcasted_iota(jnp.int32, (_ROWS, _BLOCK), 1 - rows_axis, layout=plgpu.Layout.WGMMA)
    position = keys + block * _BLOCK
    first, last = (_wide(_load(seen_ref.at[edge, chunk], rows_axis), rows_axis) for edge in range(2))
    return (position >= first) & (position <= last)


def _load(values_ref, axis):
    """Load 64 values in the layout that `_wide` takes."""
    return plgpu.layout_cast(values_ref[...], plgpu.Layout.WGMMA.reduce(1 - axis))


def _chunks(q_ref):
    """The [64, E] chunks of [M, E]."""
    return [q_ref.at[pl.ds(start, _ROWS)] for start in range(0, q_ref.shape[0], _ROWS)]


def _log_sum_exp(over_blocks, out_ref, q_ref, seen_ref, *, scale):
    chunks = _chunks(q_ref)

    def add(block, keys_ref, carry):
        return tuple(add_to_chunk(block, keys_ref, chunk, *so_far) for chunk, so_far in enumerate(carry))

    def add_to_chunk(block, keys_ref, chunk, old, total):
        logits = _product(chunks[chunk], keys_ref) * scale
        logits = jnp.where(_seen(seen_ref, chunk, block, rows_axis=0), logits, _MASKED)
        peak = jnp.maximum(old, logits.max(axis=1))
        return peak, total * jnp.exp(old - peak) + jnp.exp(logits - _wide(peak, 0)).sum(axis=1)

    def filled(value):
        return plgpu.layout_cast(jnp.full((_ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))

    totals = over_blocks(add, tuple((filled(_MASKED), filled(0.0)) for _ in chunks))
    for chunk, (peak, total) in enumerate(totals):
        out_ref[(*_place(), pl.ds(chunk * _ROWS, _ROWS))] = peak + jnp.log(total)


def _masses(over_blocks, out_ref, q_ref, seen_ref, to_sum_ref, scores_ref, *, scale, largest_exponent):
    b, _, g = _place()

    def score(block, keys_ref):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for chunk, queries_ref in enumerate(_chunks(q_ref)):
            logits = _product(keys_ref, queries_ref) * scale
            relative = logits - _wide(_load(to_sum_ref.at[0, chunk], 1), 1)
            mass = jnp.exp(jnp.minimum(relative, largest_exponent))
            mass = jnp.where(_seen(seen_ref, chunk, block, rows_axis=1), mass, 0.0)

            @pl.loop(0, scores_ref.shape[0])
            def _(n, chunk=chunk, mass=mass):
                total = (mass * _wide(_load(to_sum_ref.at[n + 1, chunk], 1), 1)).sum(axis=1)
                scores_ref[n] = total + _load(scores_ref.at[n], 0) if chunk else total

        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scores_ref, out_ref.at[b, g, :, pl.ds(block * _BLOCK, _BLOCK)])

    over_blocks(score)
    plgpu.wait_smem_to_gmem(0)
