"""Attention on NVIDIA GPUs by this project's own kernel, for what cuDNN does not serve."""

import jax
import jax.numpy as jnp

from gemfilter_jax.ops.attention.visibility import TriShape, refuse_positions
from gemfilter_jax.ops.dispatch import check_compute_capability


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
    interpret: bool = False,
) -> jax.Array:
    """`attention.causal` in one kernel, which visits only blocks with a visible key; zeros for blocks of padding.

    Args:
      interpret: run the kernel step by step in XLA, on any platform.

    Raises:
      NotImplementedError: the call has a window together with positions, the kernel does not support the dtype, head
        width or device, or this JAX cannot compile it.
    """
    refuse_positions(positions, window)
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"takes bfloat16 and float16, not {q.dtype}")
    if q.shape[-1] > 256:
        raise NotImplementedError(f"takes head widths up to 256, not {q.shape[-1]}")
    check_compute_capability(8)
    try:
        from gemfilter_jax.pallas_kernels import gpu_attention
    except ImportError as error:
        raise NotImplementedError(f"JAX {jax.__version__} has no Triton lowering of Pallas") from error
    length = q.shape[1]
    far = jnp.minimum(length if window is None else window, length)
    near, first, dense = far, 0, lengths
    if pattern is not None:
        near, first = jnp.minimum(far, pattern.band), min(pattern.first, length)
        dense = jnp.maximum(lengths - pattern.suffix_lengths, 0)
    limits = jnp.stack(jnp.broadcast_arrays(lengths, dense, near, far), axis=1).astype(jnp.int32)
    return gpu_attention.attend(q, k, v, limits, first=first, scale=scale, soft_cap=soft_cap, interpret=interpret)
