"""How far float32 results may lie from exact ones: what rounding allows for sums of so many terms.

Each addition of n terms of magnitude m errs by up to m * u, u = 2^-24, in whatever order a processor adds them; so that
the sum errs by up to n * m * u. These bounds depend on shapes and numbers, and on no machine.
"""

import numpy as np

from gemfilter_jax.config import ModelConfig

UNIT = 2.0**-24
"""Of float32: half the distance of 1 to the next number."""


def of_sum(terms, magnitude):
    """Largest error of a float32 sum.

    Args:
      terms: numbers of them, added one after the other. magnitude: sums of their absolute values.
    """
    return terms * UNIT * magnitude


def of_attention(seen: np.ndarray, products: float, head_width: int) -> np.ndarray:
    """Relative errors [Q] of softmax-weighted means, against the same means of absolute values.

    Args:
      seen: [Q], keys that each query sees. products: largest |q||k| / sqrt(E) of a query and a key, or 0 where products
        are exact. head_width: E.
    """
    # A product, and the largest one that is subtracted from it, err by (E + 2) terms; then come exponentials and two
    # sums over the keys, of weights and of weighted values.
    return of_sum(2 * (head_width + 2) * products + 2 * seen + 8, 1.0)


def of_scores(seen: int, products: float, head_width: int, rows: int, heads: int) -> float:
    """Relative error of key scores: attention probabilities, or their like against a key, summed over rows and heads.

    Args:
      seen, products, head_width: as in `of_attention`. rows, heads: that observe.
    """
    return float(of_attention(np.array(seen), products, head_width) + of_sum(rows * heads, 1.0))


def likely(worst: float, terms: int) -> float:
    """What a bound on `terms` roundings comes to if they have either sign: eight standard deviations of their sum."""
    return 8 * worst / np.sqrt(3 * terms)


def of_decoder(config: ModelConfig, length: int, magnitude: float) -> float:
    """Largest difference of what two orders of summation make of a prompt, for logits or the residual stream.

    A number passes through the sums of every layer in turn: two norms and what the projections read, products of
    queries and keys, and means over the keys. Norms hold what follows to the magnitude of what went before.

    Args:
      length: of the prompt. magnitude: of the largest of the results.
    """
    return of_sum(terms_of_decoder(config, length), magnitude)


def terms_of_decoder(config: ModelConfig, length: int) -> int:
    """How many roundings `of_decoder` counts."""
    read = 5 * config.width + config.heads * config.head_width + config.mlp_width
    return config.layers * (read + config.head_width + length) + 2 * config.width
