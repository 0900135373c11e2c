"""Selection scores in float64 NumPy, through the [H, W, S] array that the package never makes, and inputs for them."""

import numpy as np


def reference(
    q: np.ndarray,
    rows: np.ndarray,
    k: np.ndarray,
    weights: np.ndarray,
    normalisation: str,
    window: int | None = None,
    scale: float | None = None,
    positions: np.ndarray | None = None,
) -> np.ndarray:
    """One prompt: q [W, H, E], rows [W], k [S, G, E], positions [S] -> [S], or [N, S] for weights [N, H]."""
    q, k = q.astype(np.float64)[rows >= 0], k.astype(np.float64)
    rows = rows[rows >= 0]
    products = np.einsum("whe,she->hws", q, np.repeat(k, q.shape[1] // k.shape[1], axis=1))
    if normalisation == "none":
        return np.einsum("hws,...h->...s", products, weights)
    products *= q.shape[-1] ** -0.5 if scale is None else scale
    distance = rows[:, None] - np.arange(len(k))
    counted = distance if positions is None else positions[rows][:, None] - positions
    logits = np.where((distance >= 0) & (counted < (window or np.inf)), products, -np.inf)
    if normalisation == "softmax":
        masses = np.exp(logits - logits.max(axis=-1, keepdims=True))
        masses /= masses.sum(axis=-1, keepdims=True)
    else:
        masses = np.exp(logits - products[..., :1])
    return np.einsum("hws,...h->...s", masses, weights)


def largest_error(
    q: np.ndarray,
    rows: np.ndarray,
    k: np.ndarray,
    weights: np.ndarray,
    normalisation: str,
    window: int | None = None,
    scale: float | None = None,
    positions: np.ndarray | None = None,
) -> np.ndarray:
    """How far float32 arithmetic may be from `reference` at each key, for weights that are not negative.

    A sum of n products errs by at most n + 2 roundings of the sum of their sizes. An error in a logit is a relative one
    of its mass.
    """
    unit = np.finfo(np.float32).eps / 2
    (observed, heads, width), keys = q.shape, len(k)
    sizes = np.abs(q.astype(np.float64)), np.abs(k.astype(np.float64))
    if normalisation == "none":
        return (observed + heads + width + 8) * unit * reference(sizes[0], rows, sizes[1], weights, "none")
    largest = np.einsum("whe,she->hws", sizes[0], np.repeat(sizes[1], heads // k.shape[1], axis=1)).max()
    largest *= width**-0.5 if scale is None else scale
    roundings = 2 * (width + 8) * largest + keys + observed * heads + 32
    return (
        roundings * unit * reference(q, rows, k, weights, normalisation, window, scale, positions)
        + np.finfo(np.float32).tiny
    )


def inputs(lengths: tuple[int, ...], window: int, heads: int, groups: int, width: int = 16, dtype=np.float32):
    """Random q [B, W, H, E] of the last rows [B, W], k [B, S, G, E] and head weights [H], of which one is 0."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(len(lengths), window, heads, width)).astype(dtype)
    k = rng.normal(size=(len(lengths), max(lengths), groups, width)).astype(dtype)
    rows = np.asarray(lengths)[:, None] - window + np.arange(window)
    weights = rng.uniform(size=heads).astype(np.float32)
    weights[0] = 0.0
    return q, rows, k, weights
