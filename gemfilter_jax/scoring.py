"""The one door to selection scoring: how much the observation rows attend to each key, without a [H, W, S] array.

Axes: B batch, S prompt tokens, W observation rows, H query heads, G key/value heads, E head width.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange, reduce

Normalisation = Literal["none", "softmax", "sink"]

_BLOCK = 1024  # keys scored at a time: bounds the logits to [B, H, W, block]
_LARGEST_EXPONENT = 60.0  # e^60 summed over all rows and heads still fits float32


def score_keys(
    q: jax.Array, rows: jax.Array, k: jax.Array, *, head_weights: jax.Array, normalisation: Normalisation
) -> jax.Array:
    """The score of every key, summed over observation rows and weighted heads.

    Args:
      q: [B, W, H, E], queries after rotary. rows: int [B, W], their positions; negative ones do not count.
      k: [B, S, G, E], keys after rotary.
      head_weights: float [H], or [N, H] for N weightings at once.
      normalisation: what becomes of the inner products of a row and the keys up to its own position.
        "none": summed as they are, without scale, over all keys (GemFilter, arXiv 2409.17422, section 3).
        "softmax": attention probabilities.
        "sink": exp(logit - logit of key 0), comparable between segments that share their first tokens, where each
        segment's own softmax is not.

    Returns:
      float32 [B, S], or [B, N, S] for N weightings. Keys of padding score too under "none": mask them by length.
    """
    with jax.named_scope("scoring"):
        groups = k.shape[2]
        weighted = head_weights.astype(jnp.float32)
        if normalisation == "none":
            counted = reduce(q.astype(jnp.float32) * (rows >= 0)[..., None, None], "b w h e -> b h e", "sum")
            counted = rearrange(counted, "b (g r) e -> b g r e", g=groups)
            summed = jnp.einsum("bgre,...gr->b...ge", counted, _by_group(weighted, groups), precision="highest")
            return jnp.einsum("b...ge,bsge->b...s", summed, k, precision="highest", preferred_element_type=jnp.float32)
        return _masses(q, rows, k, weighted, from_sink=normalisation == "sink")


def _masses(q: jax.Array, rows: jax.Array, k: jax.Array, head_weights: jax.Array, *, from_sink: bool) -> jax.Array:
    length, groups = k.shape[1], k.shape[2]
    block = min(_BLOCK, length)
    key_blocks = jnp.pad(k, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
    key_blocks = rearrange(key_blocks, "b (n s) g e -> n b g s e", s=block)
    queries = rearrange(q.astype(jnp.float32) * q.shape[-1] ** -0.5, "b w (g r) e -> b g r w e", g=groups)

    def logits(index, keys):
        products = jnp.einsum("bgrwe,bgse->bgrws", queries, keys.astype(jnp.float32), precision="highest")
        seen = index * block + jnp.arange(block) <= rows[:, None, None, :, None]
        return jnp.where(seen, products, -jnp.inf)

    numbered = (jnp.arange(len(key_blocks)), key_blocks)
    if from_sink:
        reference = logits(0, key_blocks[0])[..., 0]
    else:
        per_block = jax.lax.map(lambda x: jax.nn.logsumexp(logits(*x), axis=-1), numbered)
        reference = jax.nn.logsumexp(per_block, axis=0)

    weights = _by_group(head_weights, groups)

    def mass(numbered_block):
        relative = logits(*numbered_block) - jnp.where(jnp.isfinite(reference), reference, 0.0)[..., None]
        return jnp.einsum("bgrws,...gr->b...s", jnp.exp(jnp.minimum(relative, _LARGEST_EXPONENT)), weights)

    return rearrange(jax.lax.map(mass, numbered), "n b ... s -> b ... (n s)")[..., :length]


def _by_group(head_weights: jax.Array, groups: int) -> jax.Array:
    """[..., H] -> [..., G, H / G]."""
    return rearrange(head_weights, "... (g r) -> ... g r", g=groups)
