"""Attention on TPU by JAX's splash attention kernel (Pallas)."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask_info

from gemfilter_jax.ops.attention import xla
from gemfilter_jax.ops.attention.visibility import TriShape, refuse_positions, static_window

_LANES = 128  # block sizes are multiples of it
_BLOCK = 512
_TABLE_BYTES = 800 * 1024  # of the 1 MiB of scalar memory: enough for dense attention at S = 262,144


@dataclasses.dataclass(frozen=True)
class _Visible:
    """Which keys a query sees: the last `near` keys, and the prompt's `first` keys among the last `far`."""

    near: int
    far: int
    first: int

    def __call__(self, query: Any, key: Any) -> Any:
        """The mask at query and key positions that broadcast, NumPy arrays or the kernel's."""
        distance = query - key
        return (distance >= 0) & ((distance < self.near) | ((key < self.first) & (distance < self.far)))

    def blocks(self, count: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The key blocks that each of `count` query blocks visits.

        Returns:
          int [count, V], the visited blocks in order; the query block's own is the last and is repeated as
          filler. bool [count, V], false for filler.
        """
        query, key = np.arange(count)[:, None], np.arange(count)
        closest = (query - key - 1) * block + 1
        seen = (closest < self.near) | ((key * block < self.first) & (closest < self.far))
        seen &= key <= query
        visits = seen.sum(axis=1, keepdims=True)
        order = np.argsort(~seen, axis=1, kind="stable")[:, : visits.max()]
        real = np.arange(visits.max()) < visits
        return np.where(real, order, query), real


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
    """`attention.causal` in one kernel, which visits only blocks with a visible key and masks within them.

    A tri_shape's first tokens and band share the kernel's softmax; its last rows are computed in XLA.

    Args:
      interpret: run the kernel step by step in XLA, on any platform.

    Raises:
      NotImplementedError: the window is traced or given together with positions, the dtype is not supported, or there
        are too many blocks for scalar memory.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"takes bfloat16 and float32, not {q.dtype}")
    refuse_positions(positions, window)
    length = q.shape[1]
    far = static_window(window, length)
    near, first = (far, 0) if pattern is None else (min(pattern.band, far), min(pattern.first, length))
    block = min(_BLOCK, -(-length // _LANES) * _LANES)
    q_blocks, k_blocks, v_blocks = (rearrange(xla.padded(x, block), "b s h e -> b h s e") for x in (q, k, v))
    q_blocks = xla.scaled(q_blocks, scale)
    visible, count = _Visible(near, far, first), q_blocks.shape[2] // block
    kernel = _kernel(visible, count, block, jnp.max(lengths), soft_cap, interpret)
    with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default"):
        out = rearrange(jax.vmap(kernel)(q_blocks, k_blocks, v_blocks), "b h s e -> b s h e")[:, :length]
    if pattern is None:
        return out
    return xla.with_suffixes(
        out, q, k, v, lengths=lengths, window=window, pattern=pattern, scale=scale, soft_cap=soft_cap
    )


def _kernel(
    visible: _Visible, count: int, block: int, longest: jax.Array, soft_cap: float | None, interpret: bool
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """The kernel of one prompt: q [H, S, E], k, v [G, S, E] -> [H, S, E].

    It is built from an explicit list of blocks, because `make_splash_mha` would evaluate the mask at all S x S
    positions. Query blocks from `longest` on hold only padding and visit only their own key block.
    """
    blocks, real = visible.blocks(count, block)
    size = blocks.size * (blocks.astype(np.int16).itemsize + real.itemsize)
    if size > _TABLE_BYTES:
        raise NotImplementedError(
            f"the list of visited blocks takes {size} bytes of scalar memory, over {_TABLE_BYTES}"
        )
    own = np.broadcast_to(np.arange(count)[:, None], blocks.shape)
    padding = own * block >= longest
    last_visit = np.arange(blocks.shape[1]) == real.sum(axis=1, keepdims=True) - 1
    mask_info = splash_attention_mask_info.MaskInfo(
        data_next=jnp.where(padding, own, blocks).astype(jnp.int16)[None],
        mask_next=None,
        block_mask=jnp.where(padding, last_visit, real).astype(jnp.int8)[None],
        partial_mask_blocks=None,
        q_sequence=np.arange(count * block, dtype=np.int32),
    )
    kernel = splash_attention_kernel.SplashAttentionKernel(
        mask_info,
        None,
        None,
        block_sizes=splash_attention_kernel.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name=None,
        mask_function=visible,
        interpret=interpret,
    )
    return cast(Callable[[jax.Array, jax.Array, jax.Array], jax.Array], kernel)
