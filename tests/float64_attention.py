"""Attention in float64 NumPy, through the S x S array that the package never makes, and how far from it one may be."""

import numpy as np


def visible(
    positions: np.ndarray, window: int | None = None, tri_shape: tuple[int, int, int] | None = None
) -> np.ndarray:
    """bool [S, S], which slots (columns) each slot of one prompt sees.

    Args:
      positions: int [S], where the slots stand. tri_shape: first tokens and band, in slots, and rows in the tail.
    """
    length = len(positions)
    slots = np.subtract.outer(np.arange(length), np.arange(length))
    seen = slots >= 0
    if tri_shape is not None:
        first, band, tail = tri_shape
        seen &= (slots < band) | (np.arange(length) < first) | (np.arange(length)[:, None] >= length - tail)
    if window is not None:
        seen &= np.subtract.outer(positions, positions) < window
    return seen


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    seen: np.ndarray,
    scale: float | None,
    soft_cap: float | None,
    unit: float,
    exact_logits: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Softmax attention of q [Q, H, E] to k, v [S, G, E], as `seen` [Q, S] masks, and the largest error of each value.

    The error is that of float32 sums with masses and results rounded to q's dtype, whose roundings are of relative size
    `unit`. A sum of n products errs by at most n + 2 roundings of the sum of their sizes; an error in a logit is a
    relative one of its share, and there is none where they are exact. Queries may be rounded once more, by the scale,
    unless it is a power of two.
    """
    single = np.finfo(np.float32).eps / 2
    width = q.shape[-1]
    scale = width**-0.5 if scale is None else scale
    k, v = (np.repeat(x.astype(np.float64), q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    q = q.astype(np.float64)
    logits = scale * np.einsum("qhe,khe->hqk", q, k)
    sizes = np.where(seen, scale * np.einsum("qhe,khe->hqk", np.abs(q), np.abs(k)), 0)
    of_logits = ((width + 8) * single + (0 if np.frexp(scale)[0] == 0.5 else 2 * unit)) * sizes.max(axis=-1)
    of_logits = np.zeros_like(of_logits) if exact_logits else of_logits
    if soft_cap is not None:
        logits = soft_cap * np.tanh(logits / soft_cap)
        of_logits += 8 * single * soft_cap
    logits = np.where(seen, logits, -np.inf)
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    relative = 2 * of_logits + (2 * seen.sum(axis=-1) + 32) * single + 2 * unit
    out = np.einsum("hqk,khe->qhe", shares, v)
    return out, relative.T[..., None] * np.einsum("hqk,khe->qhe", shares, np.abs(v))
