"""The one door to attention. Axes as in `models.decoder`; no implementation here makes an S x S array."""

import jax
import jax.numpy as jnp
from einops import rearrange

_BLOCK = 512  # queries and keys per block: the fastest of 64..1024 on two AVX-512 cores at S = 8192, E = 64
_MASKED = -1e30  # finite, so that a row without any visible key yields numbers instead of NaN


def causal(
    q: jax.Array, k: jax.Array, v: jax.Array, *, lengths: jax.Array, window: jax.typing.ArrayLike | None = None
) -> jax.Array:
    """Causal self-attention of a right-padded prompt, blockwise with an online softmax (Dao et al. 2022).

    Blocks above the diagonal or before every row's window, and query blocks that hold only padding, are skipped. A
    real row never sees padding, because padding lies to its right.

    Args:
      q: [B, S, H, E]. k, v: [B, S, G, E]. lengths: [B].
      window: how many keys a query sees, its own included, may be traced; None for all before it.

    Returns:
      [B, S, H, E] in q's dtype; rows of padding are unspecified but finite.
    """
    with jax.named_scope("attention"):
        length = q.shape[1]
        block = min(_BLOCK, length)
        padding = -length % block
        if padding:
            q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
        return _blockwise(q, k, v, lengths, block, window)[:, :length]


def _blockwise(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, block: int, window: jax.typing.ArrayLike | None
) -> jax.Array:
    groups, repeats = k.shape[2], q.shape[2] // k.shape[2]
    precision = _precision(q)
    scaled = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    query_blocks = rearrange(scaled, "b (n s) (g r) e -> n b g (r s) e", s=block, g=groups)
    k, v = rearrange(k, "b s g e -> b g s e"), rearrange(v, "b s g e -> b g s e")
    ahead = jnp.tile(jnp.arange(block)[:, None] - jnp.arange(block), (repeats, 1))  # of a query to a key in one block
    last_block = (jnp.max(lengths) - 1) // block

    def attend(index, rows):
        def accumulate(j, carry, diagonal=False):
            acc, peak, total = carry
            kj = jax.lax.dynamic_slice_in_dim(k, j * block, block, axis=2)
            vj = jax.lax.dynamic_slice_in_dim(v, j * block, block, axis=2)
            logits = jnp.einsum("bgqe,bgke->bgqk", rows, kj, precision=precision, preferred_element_type=jnp.float32)
            distance = ahead + (index - j) * block
            if diagonal:
                logits = jnp.where(distance >= 0, logits, _MASKED)
            if window is not None:
                logits = jnp.where(distance < window, logits, _MASKED)
            new_peak = jnp.maximum(peak, logits.max(axis=-1))
            mass = jnp.exp(logits - new_peak[..., None])
            decay = jnp.exp(peak - new_peak)
            update = jnp.einsum(
                "bgqk,bgke->bgqe", mass.astype(vj.dtype), vj, precision=precision, preferred_element_type=jnp.float32
            )
            return acc * decay[..., None] + update, new_peak, total * decay + mass.sum(axis=-1)

        empty = (
            jnp.zeros(rows.shape, jnp.float32),
            jnp.full(rows.shape[:-1], _MASKED),
            jnp.zeros(rows.shape[:-1], jnp.float32),
        )
        first = 0 if window is None else jnp.maximum(index * block - window + 1, 0) // block
        below = jax.lax.fori_loop(first, index, accumulate, empty)
        acc, _, total = accumulate(index, below, diagonal=True)
        return (acc / total[..., None]).astype(q.dtype)

    def attend_unless_padding(index_and_rows):
        index, rows = index_and_rows
        return jax.lax.cond(index <= last_block, attend, lambda _, rows: jnp.zeros_like(rows), index, rows)

    out = jax.lax.map(attend_unless_padding, (jnp.arange(len(query_blocks)), query_blocks))
    return rearrange(out, "n b g (r s) e -> b (n s) (g r) e", r=repeats)


def one_row(
    q: jax.Array, k: jax.Array, v: jax.Array, *, lengths: jax.Array, window: jax.typing.ArrayLike | None = None
) -> jax.Array:
    """Attention of one new token per row to a cache.

    Args:
      q: [B, 1, H, E]. k, v: [B, C, G, E]. lengths: [B], how many of the C are filled, the new token included.
      window: how many of the last keys the token sees, its own included, may be traced; None for all.

    Returns:
      [B, 1, H, E].
    """
    with jax.named_scope("attention"):
        precision = _precision(q)
        rows = rearrange(q[:, 0] * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), "b (g r) e -> b g r e", g=k.shape[2])
        logits = jnp.einsum("bgre,bcge->bgrc", rows, k, precision=precision, preferred_element_type=jnp.float32)
        places = jnp.arange(k.shape[1])
        visible = places < lengths[:, None]
        if window is not None:
            visible &= places >= lengths[:, None] - window
        weights = jax.nn.softmax(jnp.where(visible[:, None, None], logits, _MASKED), axis=-1)
        out = jnp.einsum(
            "bgrc,bcge->bgre", weights.astype(v.dtype), v, precision=precision, preferred_element_type=jnp.float32
        )
        return rearrange(out, "b g r e -> b 1 (g r) e").astype(q.dtype)


def _precision(x: jax.Array) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
