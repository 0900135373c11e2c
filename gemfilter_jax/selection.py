"""From scores to the kept tokens: pooling, chunks, required tokens, top-k in prompt order."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

Pooling = Literal["none", "mean", "max"]

_BEST_OF_CHUNK = 4  # a chunk scores the mean of this many of its best tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """The kept tokens of each row, in prompt order.

    Attributes:
      indices: int32 [B, K], strictly increasing over the first `lengths` entries; the rest hold S.
      lengths: int32 [B], how many are kept.
    """

    indices: jax.Array
    lengths: jax.Array


def pool(scores: jax.Array, kind: Pooling, kernel: int) -> jax.Array:
    """Pool scores [B, S] over `kernel` neighbours, stride 1, same length.

    "mean" counts the zeros beyond both ends, as the reference implementation of GemFilter does.
    """
    if kind == "none" or kernel == 1:
        return scores
    initial, combine = (0.0, jax.lax.add) if kind == "mean" else (-jnp.inf, jax.lax.max)
    left = kernel // 2
    pooled = jax.lax.reduce_window(scores, initial, combine, (1, kernel), (1, 1), ((0, 0), (left, kernel - 1 - left)))
    return pooled / kernel if kind == "mean" else pooled


def chunk_scores(scores: jax.Array, counted: jax.Array, start: jax.Array, chunk: int) -> jax.Array:
    """Give each token the score of its chunk: the mean of the chunk's best tokens.

    Args:
      scores: float32 [B, S]. counted: bool [B, S], tokens that take part.
      start: int [B], where a row's chunks begin to be counted off; earlier tokens form chunks before it.
      chunk: P, tokens in a chunk.

    Returns:
      float32 [B, S]; -inf where no token of the chunk takes part.
    """
    batch, length = scores.shape
    # Rows are shifted right so that `start` falls on a multiple of P, then cut into whole chunks.
    shift = (-start) % chunk
    chunks = -(-(length + chunk - 1) // chunk)
    columns = jnp.arange(chunks * chunk) - shift[:, None]
    inside = (columns >= 0) & (columns < length)
    source = jnp.clip(columns, 0, length - 1)
    counted = jnp.take_along_axis(counted, source, axis=1) & inside
    shifted = jnp.where(counted, jnp.take_along_axis(scores, source, axis=1), -jnp.inf)
    best, _ = jax.lax.top_k(shifted.reshape(batch, chunks, chunk), min(_BEST_OF_CHUNK, chunk))
    present = best > -jnp.inf
    total = jnp.where(present, best, 0.0).sum(axis=-1)
    means = jnp.where(present.any(axis=-1), total / jnp.maximum(present.sum(axis=-1), 1), -jnp.inf)
    return jnp.take_along_axis(means, (jnp.arange(length) + shift[:, None]) // chunk, axis=1)


def select(
    scores: jax.Array,
    lengths: jax.Array,
    *,
    keep: jax.typing.ArrayLike,
    capacity: int,
    required: jax.Array | None = None,
    pooling: Pooling = "none",
    kernel: int = 1,
    chunk: int = 1,
    chunk_start: jax.Array | None = None,
) -> Selection:
    """Keep the best tokens of each row.

    Exactly min(keep, length) tokens are kept, without duplicates, in prompt order; padding never, required tokens
    always (the caller sees to it that they are no more than `keep`), ties go to the earlier token. Scores of required
    tokens reach neither their neighbours' pools nor their chunks: they are kept anyway and would only crowd.

    Args:
      scores: float32 [B, S]. lengths: int [B].
      keep: K or fewer, may be traced. capacity: K, the width of the result.
      required: bool [B, S]. pooling, kernel: see `pool`.
      chunk: P; above 1, whole chunks are ranked and only the last one kept may be cut. chunk_start: see `chunk_scores`.
    """
    with jax.named_scope("selection"):
        batch, length = scores.shape
        real = jnp.arange(length) < lengths[:, None]
        free = real if required is None else real & ~required
        neutral = 0.0 if pooling == "mean" else -jnp.inf
        ranked = pool(jnp.where(free, scores, neutral), pooling, kernel)
        if chunk > 1:
            start = jnp.zeros((batch,), jnp.int32) if chunk_start is None else chunk_start
            ranked = chunk_scores(ranked, free, start, chunk)
        # Free tokens stay finite, so that they rank below every required token and above all padding.
        limits = jnp.finfo(jnp.float32)
        ranked = jnp.clip(jnp.where(jnp.isnan(ranked), limits.min, ranked), limits.min, limits.max)
        ranked = jnp.where(free, ranked, jnp.where(real, jnp.inf, -jnp.inf))
        width = min(capacity, length)
        _, best = jax.lax.top_k(ranked, width)
        kept = jnp.minimum(jnp.asarray(keep, jnp.int32), lengths.astype(jnp.int32))
        indices = jnp.sort(jnp.where(jnp.arange(width) < kept[:, None], best, length), axis=1)
        indices = jnp.pad(indices, ((0, 0), (0, capacity - width)), constant_values=length)
        return Selection(indices.astype(jnp.int32), kept)
