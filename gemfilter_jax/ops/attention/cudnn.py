"""Attention on NVIDIA GPUs by cuDNN's flash attention, through `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp

from gemfilter_jax.ops.attention.visibility import TriShape, refuse_positions, static_window
from gemfilter_jax.ops.dispatch import check_compute_capability

_BLOCK = 512


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
    """`attention.causal` in one call; zeros for rows of padding.

    Raises:
      NotImplementedError: the call has a tri_shape, a soft cap, a traced window, or a window together with positions;
        cuDNN does not support the dtype, head width or device; or cuDNN is missing.
    """
    if pattern is not None:
        raise NotImplementedError(f"gives its log-sum-exp in {q.dtype}, too coarse to merge a tri_shape's parts by")
    if soft_cap is not None:
        raise NotImplementedError("has no soft cap of logits")
    refuse_positions(positions, window)
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"takes bfloat16 and float16, not {q.dtype}")
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        raise NotImplementedError(f"takes head widths that are multiples of 8 up to 256, not {q.shape[-1]}")
    check_compute_capability(8)
    lengths = lengths.astype(jnp.int32)
    before = None if window is None else static_window(window, q.shape[1]) - 1
    try:
        out = jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            scale=scale,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            local_window_size=None if before is None else (before, 0),
            implementation="cudnn",
        )
    except RuntimeError as error:
        if isinstance(error, NotImplementedError):
            raise
        raise NotImplementedError(str(error)) from error
    return without_padding(out, lengths)


def without_padding(x: jax.Array, lengths: jax.Array) -> jax.Array:
    """x [B, S, H, E] with zeros in rows from `lengths` [B] on, in place: only blocks with such rows are touched."""
    size = x.shape[1]
    block = min(_BLOCK, size)

    def clear(index: jax.Array, x: jax.Array) -> jax.Array:
        start = jnp.minimum(index * block, size - block)
        rows = jax.lax.dynamic_slice_in_dim(x, start, block, 1)
        real = start + jnp.arange(block) < lengths[:, None]
        return jax.lax.dynamic_update_slice_in_dim(x, jnp.where(real[..., None, None], rows, 0), start, 1)

    return jax.lax.fori_loop(lengths.min() // block, -(-size // block), clear, x)
