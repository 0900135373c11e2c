"""One pass of the filter: token ids and a method in, a score for each token out.

Programs of a model on a mesh run on all its devices: `score_prompt` shards prompts over the seq axis, the others shard
the batch over that axis and the data axis. Batches must then be multiples of what shards them, see `sharding.evenly`.

Axes: B batch, S prompt bucket, T bucket of what follows a beginning, H query heads, N weightings of
them, W observation rows.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from gemfilter_jax import calls
from gemfilter_jax.buckets import bucket
from gemfilter_jax.generate.loop import pad
from gemfilter_jax.models import filter_view
from gemfilter_jax.models.cache import KVCache, cache_specs
from gemfilter_jax.models.transformer import Decoder
from gemfilter_jax.ops import Normalisation
from gemfilter_jax.ops.attention import TriShape
from gemfilter_jax.ops.key_scores import score_keys
from gemfilter_jax.parallel import collectives, sharding, shards
from gemfilter_jax.text.prompt import Prompt

if TYPE_CHECKING:
    from gemfilter_jax.methods.gemfilter.method import GemFilter


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("filter_layer", "layers", "head_weights", "pattern"),
    meta_fields=("observation_window", "normalisation", "int8"),
)
@dataclasses.dataclass(frozen=True)
class ScoringPass:
    """What a method says of a pass, as an argument of the programs.

    Attributes:
      filter_layer: the last layer that is looked at, int32.
      layers: int32 [N], where each weighting looks; where there is one, at r.
      head_weights: float32 [N, H].
      pattern: of attention; None for dense.
      observation_window: W, static.
      normalisation: see `key_scores.score_keys`; static.
      int8: whether layers multiply matrices in int8; static.
    """

    filter_layer: jax.typing.ArrayLike
    layers: jax.Array
    head_weights: jax.Array
    pattern: TriShape | None
    observation_window: int
    normalisation: Normalisation
    int8: bool

    @classmethod
    def of(
        cls, method: "GemFilter", heads: int, *, document: int, suffix_lengths: np.ndarray, whole: bool = True
    ) -> "ScoringPass":
        """A pass over prompts.

        Args:
          heads: H, of the model.
          document: tokens of the longest document among them.
          suffix_lengths: int [B], tokens behind each document, which see everything.
          whole: whether these are whole prompts, not segments; probabilities of one segment mean nothing beside
            another's.
        """
        pattern = None
        if is_tri_shape(method, document):
            room = bucket(int(suffix_lengths.max()), smallest=1) if suffix_lengths.any() else 0
            of_rows = jnp.asarray(suffix_lengths, jnp.int32)
            pattern = TriShape(of_rows, first=method.first_tokens, band=method.band, room=room)
        layers, weights = _weightings(method, heads)
        return cls(
            filter_layer=jnp.int32(method.looks_at[-1]),
            layers=jnp.asarray(layers, jnp.int32),
            head_weights=jnp.asarray(weights, jnp.float32),
            pattern=pattern,
            observation_window=method.observation_window,
            normalisation="sink" if method.normalisation == "softmax" and not whole else method.normalisation,
            int8=method.filter_precision == "int8",
        )

    def prepared(self, model: Decoder) -> Decoder:
        """The model as the pass runs it."""
        return model.in_int8() if self.int8 else model

    def of_layer(self, layer: jax.typing.ArrayLike) -> jax.Array:
        """float32 [N, H], the weights of this device's heads of a layer; 0 for weightings that look elsewhere."""
        return collectives.own_shard(self.head_weights * (self.layers == layer)[:, None], "model", 1)


def _weightings(method: "GemFilter", heads: int) -> tuple[np.ndarray, np.ndarray]:
    """The layers [N] that a method looks at, and the weights [N, H] of their heads."""
    if method.heads is None:
        return np.array([method.filter_layer]), np.array([method.head_weights or (1.0,) * heads])
    chosen = method.chosen_heads
    return np.array([one.layer for one in chosen]), np.eye(heads)[[one.head for one in chosen]]


def is_tri_shape(method: "GemFilter", document: int) -> bool:
    """Whether attention over a document of so many tokens is local; dense is as fast below twice the band."""
    return method.filter_attention == "tri_shape" or (method.filter_attention == "auto" and document > 2 * method.band)


def scores(
    model: Decoder,
    ids: list[np.ndarray],
    prompts: Sequence[Prompt],
    method: "GemFilter",
    *,
    whole: bool,
    document: int,
    width: int,
) -> np.ndarray:
    """float32 [B, N, width], of token ids that begin and end as their prompts do.

    Args:
      whole: whether that is all of a prompt, not one of several segments.
      document: tokens of the longest document, or segment of one, among which this is.
    """
    rows = sharding.shape_of(model.mesh).data
    padded, lengths = pad(sharding.evenly(ids, rows), width)
    suffix_lengths = np.array([prompt.suffix_length for prompt in sharding.evenly(prompts, rows)], np.int32)
    scoring = ScoringPass.of(method, model.config.heads, document=document, suffix_lengths=suffix_lengths, whole=whole)
    made = calls.call(score_prompt, model, padded, lengths, jnp.asarray(suffix_lengths), scoring)
    return collectives.to_host(made)[: len(ids)]


@jax.jit
def score_prompt(
    model: Decoder, ids: jax.Array, lengths: jax.Array, suffix_lengths: jax.Array, scoring: ScoringPass
) -> jax.Array:
    """A score by each weighting for every token of prompts.

    Args:
      ids: int32 [B, S]. lengths: int32 [B].
      suffix_lengths: int32 [B], the last tokens of each prompt, of which at most the last W observe.

    Returns:
      float32 [B, N, S].
    """
    dense = scoring.pattern is None

    def scored(model, ids, lengths, suffix_lengths, scoring):
        def look(layer: jax.typing.ArrayLike, q: jax.Array, k: jax.Array, rows: jax.Array) -> jax.Array:
            return score_keys(
                q,
                _observing(rows, suffix_lengths),
                k,
                head_weights=scoring.of_layer(layer),
                normalisation=scoring.normalisation,
                sequence=shards.sequence_shards(mirrored=dense),
            )

        with jax.named_scope("filter"):
            return filter_view.looked_at(
                scoring.prepared(model),
                ids,
                lengths,
                scoring.layers,
                scoring.filter_layer,
                scoring.observation_window,
                look,
                scoring.pattern,
            )

    length, shape = ids.shape[1], sharding.shape_of(model.mesh)
    sequence = shards.SequenceShards(shape.seq, mirrored=dense and shape.seq > 1)
    ids = jnp.pad(ids, ((0, 0), (0, sequence.padded(length) - length)))
    order = sequence.order(ids.shape[1])
    batch, sharded = sharding.spec("batch"), sharding.spec("batch", "sequence")
    in_specs, out_specs = (sharded, batch, batch, _specs(scoring)), sharding.spec("batch", None, "sequence")
    run = sharding.on_devices(model, scored, in_specs, out_specs, seq="sequences")
    ordered = run(ids[:, order] if sequence.mirrored else ids, lengths, suffix_lengths, scoring)
    return (ordered[..., np.argsort(order)] if sequence.mirrored else ordered)[..., :length]


def _specs(scoring: ScoringPass) -> ScoringPass:
    """How a pass lies on a mesh: the rows of its pattern with the batch, the rest whole."""
    pattern = None if scoring.pattern is None else jax.tree.map(lambda _: sharding.spec("batch"), scoring.pattern)
    whole = dict.fromkeys(("filter_layer", "layers", "head_weights"), sharding.spec())
    return dataclasses.replace(scoring, **whole, pattern=pattern)


def _observing(rows: jax.Array, suffix_lengths: jax.Array) -> jax.Array:
    """Rows [B, W] that end a prompt, those before its suffix made -1."""
    window = rows.shape[1]
    return jnp.where(jnp.arange(window) >= window - suffix_lengths[:, None], rows, -1)


@functools.partial(jax.jit, static_argnames=("layers",))
def score_heads(
    model: Decoder,
    ids: jax.Array,
    lengths: jax.Array,
    suffix_lengths: jax.Array,
    scoring: ScoringPass,
    *,
    layers: int,
) -> jax.Array:
    """What each head of each of the first `layers` layers would score alone: float32 [layers, B, H, S]."""

    def scored(model, ids, lengths, suffix_lengths, scoring):
        each = collectives.own_shard(jnp.eye(model.config.heads), "model", 1)

        def look(q: jax.Array, k: jax.Array, rows: jax.Array) -> jax.Array:
            observing = _observing(rows, suffix_lengths)
            return score_keys(q, observing, k, head_weights=each, normalisation=scoring.normalisation)

        with jax.named_scope("filter"):
            prepared, window = scoring.prepared(model), scoring.observation_window
            return filter_view.at_each_layer(prepared, ids, lengths, layers, window, look, scoring.pattern)

    batch = sharding.spec("batch")
    run = sharding.on_devices(
        model, scored, (batch, batch, batch, _specs(scoring)), sharding.spec(None, "batch"), seq="rows"
    )
    return run(ids, lengths, suffix_lengths, scoring)


@functools.partial(jax.jit, static_argnames=("filter_layer",))
def read(
    model: Decoder,
    ids: jax.Array,
    lengths: jax.Array,
    extents: jax.Array,
    scoring: ScoringPass,
    *,
    filter_layer: int,
) -> KVCache:
    """What the filter needs of the beginnings of prompts, for any number of endings; see `score_after`.

    Args:
      ids: int32 [B, S], the beginnings. lengths: int32 [B]. extents: int32 [B], lengths of the whole prompts.
      filter_layer: r, which decides the shape of the result.
    """

    def held(model, ids, lengths, extents, scoring):
        with jax.named_scope("read"):
            return filter_view.read(scoring.prepared(model), ids, lengths, extents, filter_layer, scoring.pattern)

    batch = sharding.spec("batch")
    run = sharding.on_devices(model, held, (batch, batch, batch, _specs(scoring)), cache_specs(), seq="rows")
    return run(ids, lengths, extents, scoring)


@jax.jit
def score_after(model: Decoder, read: KVCache, ids: jax.Array, lengths: jax.Array, scoring: ScoringPass) -> jax.Array:
    """A score by each weighting for every token of prompts whose beginnings have been read.

    Args:
      read: of B beginnings of S tokens. ids: int32 [B, T], how the prompts go on.
      lengths: int32 [B], how much of that is real; at most the last W of it observe.

    Returns:
      float32 [B, N, S + T].
    """

    def scored(model, read, ids, lengths, scoring):
        def look(layer: jax.typing.ArrayLike, q: jax.Array, k: jax.Array, rows: jax.Array) -> jax.Array:
            return score_keys(q, rows, k, head_weights=scoring.of_layer(layer), normalisation=scoring.normalisation)

        with jax.named_scope("filter"):
            prepared, window = scoring.prepared(model), scoring.observation_window
            return filter_view.looked_at_after(prepared, read, ids, lengths, scoring.layers, window, look)

    batch = sharding.spec("batch")
    run = sharding.on_devices(model, scored, (cache_specs(), batch, batch, _specs(scoring)), batch, seq="rows")
    return run(read, ids, lengths, scoring)
