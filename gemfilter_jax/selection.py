"""From scores to the kept tokens: pooling, chunks, required tokens, top-k in prompt order."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

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


def chunk_slots(places: np.ndarray, start: int, chunk: int) -> np.ndarray:
    """Slots that lay the chunks of a row side by side, for `chunk_scores`; on the host.

    Args:
      places: increasing int [N], where the row's tokens stand in their prompt; some of the prompt may be missing.
      start: where in the prompt chunks begin to be counted off. chunk: P.

    Returns:
      int [N], increasing: token i is the (slot mod P)-th of the (slot div P)-th chunk that has a token here.
    """
    numbers, within = np.divmod(places - start, chunk)
    _, ranks = np.unique(numbers, return_inverse=True)
    return ranks * chunk + within


def chunk_scores(scores: jax.Array, counted: jax.Array, slots: jax.Array, chunk: int) -> jax.Array:
    """Give each token the score of its chunk: the mean of the chunk's best tokens.

    Args:
      scores: float32 [B, S]. counted: bool [B, S], tokens that take part.
      slots: int [B, S], see `chunk_slots`; at most 4 chunks more than S // P.
      chunk: P, tokens in a chunk.

    Returns:
      float32 [B, S]; -inf where no token of the chunk takes part.
    """
    batch, length = scores.shape
    chunks = length // chunk + 4  # cut ones: at the prompt's start, the document's start, its end, and by a budget
    rows = jnp.arange(batch)[:, None]
    laid_out = jnp.full((batch, chunks * chunk), -jnp.inf)
    laid_out = laid_out.at[rows, jnp.where(counted, slots, chunks * chunk)].set(scores, mode="drop")
    best, _ = jax.lax.top_k(laid_out.reshape(batch, chunks, chunk), min(_BEST_OF_CHUNK, chunk))
    present = best > -jnp.inf
    total = jnp.where(present, best, 0.0).sum(axis=-1)
    means = jnp.where(present.any(axis=-1), total / jnp.maximum(present.sum(axis=-1), 1), -jnp.inf)
    return jnp.take_along_axis(means, jnp.clip(slots // chunk, 0, chunks - 1), axis=1)


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
    slots: jax.Array | None = None,
) -> Selection:
    """Keep the best tokens of each row.

    Exactly min(keep, length) tokens are kept, without duplicates, in prompt order; padding never, required tokens
    always (the caller sees to it that they are no more than `keep`), ties go to the earlier token. Scores of required
    tokens reach neither their neighbours' pools nor their chunks: they are kept anyway and would only crowd.

    Args:
      scores: float32 [B, S]. lengths: int [B].
      keep: K or fewer, may be traced. capacity: K, the width of the result.
      required: bool [B, S]. pooling, kernel: see `pool`.
      chunk: P; above 1, whole chunks are ranked and only the last one kept may be cut.
      slots: int [B, S], see `chunk_slots`; chunks are counted off from the row's first token if None.
    """
    with jax.named_scope("selection"):
        batch, length = scores.shape
        real = jnp.arange(length) < lengths[:, None]
        free = real if required is None else real & ~required
        neutral = 0.0 if pooling == "mean" else -jnp.inf
        ranked = pool(jnp.where(free, scores, neutral), pooling, kernel)
        if chunk > 1:
            slots = jnp.broadcast_to(jnp.arange(length), (batch, length)) if slots is None else slots
            ranked = chunk_scores(ranked, free, slots, chunk)
        # Free tokens stay finite, so that they rank below every required token and above all padding.
        limits = jnp.finfo(jnp.float32)
        ranked = jnp.clip(jnp.where(jnp.isnan(ranked), limits.min, ranked), limits.min, limits.max)
        ranked = jnp.where(ranked == 0, 0.0, ranked)  # top_k would rank -0.0 below 0.0
        ranked = jnp.where(free, ranked, jnp.where(real, jnp.inf, -jnp.inf))
        width = min(capacity, length)
        _, best = jax.lax.top_k(ranked, width)
        kept = jnp.minimum(jnp.asarray(keep, jnp.int32), lengths.astype(jnp.int32))
        indices = jnp.sort(jnp.where(jnp.arange(width) < kept[:, None], best, length), axis=1)
        indices = jnp.pad(indices, ((0, 0), (0, capacity - width)), constant_values=length)
        return Selection(indices.astype(jnp.int32), kept)
