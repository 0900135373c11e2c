"""One pass of the filter: token ids and a method in, a score for each token out."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemfilter_jax.buckets import bucket
from gemfilter_jax.generate import programs
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.models.transformer import Decoder
from gemfilter_jax.ops.attention import TriShape
from gemfilter_jax.ops.key_scores import Normalisation
from gemfilter_jax.parallel import collectives, sharding
from gemfilter_jax.text.prompt import Prompt

Progress = Callable[[int, int], None]
"""Told (tokens read, tokens to read) as stage 1 goes on."""


def scores(
    model: Decoder,
    ids: list[np.ndarray],
    prompts: Sequence[Prompt],
    method: GemFilter,
    *,
    whole: bool,
    document: int,
    width: int,
) -> np.ndarray:
    """float32 [B, width], of token ids that begin and end as their prompts do.

    Args:
      whole: whether that is all of a prompt, not one of several segments.
      document: tokens of the longest document, or segment of one, among which this is.
    """
    rows = sharding.shape_of(model.mesh).data
    padded, lengths = pad(sharding.evenly(ids, rows), width)
    tails = np.array([prompt.suffix_length for prompt in sharding.evenly(prompts, rows)], np.int32)
    made = programs.score_prompt(
        filtering(model, method),
        padded,
        lengths,
        jnp.asarray(tails),
        jnp.int32(method.filter_layer),
        head_weights(model, method),
        window=method.window,
        normalisation=normalisation(method, whole),
        pattern=pattern(method, document, tails),
    )
    return collectives.to_host(made)[: len(ids)]


def filtering(model: Decoder, method: GemFilter) -> Decoder:
    """The model as it is run in the filter."""
    return model.in_int8() if method.filter_precision == "int8" else model


def head_weights(model: Decoder, method: GemFilter) -> jax.Array:
    """float32 [H]."""
    return jnp.asarray(method.head_weights or (1.0,) * model.config.heads, jnp.float32)


def is_tri_shape(method: GemFilter, document: int) -> bool:
    """Whether attention over a document of so many tokens is local; dense is as fast below twice the band."""
    return method.filter_attention == "tri_shape" or (method.filter_attention == "auto" and document > 2 * method.band)


def pattern(method: GemFilter, document: int, tails: np.ndarray) -> TriShape | None:
    """The attention of a pass over documents of so many tokens, with `tails` [B] that see everything; None is dense."""
    if not is_tri_shape(method, document):
        return None
    room = bucket(int(tails.max()), smallest=1) if tails.any() else 0
    return TriShape(jnp.asarray(tails, jnp.int32), first=method.first_tokens, band=method.band, room=room)


def normalisation(method: GemFilter, whole: bool) -> Normalisation:
    """Probabilities of one segment mean nothing beside another's."""
    return "sink" if method.normalisation == "softmax" and not whole else method.normalisation


def pad(rows: Sequence[np.ndarray], width: int) -> tuple[jax.Array, jax.Array]:
    """Rows of token ids, padded on the right to int32 [B, width], and their true lengths int32 [B]."""
    padded = np.zeros((len(rows), width), np.int32)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return jnp.asarray(padded), jnp.asarray([len(row) for row in rows], jnp.int32)
