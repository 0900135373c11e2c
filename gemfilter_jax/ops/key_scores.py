"""Key scores: how much the observation rows attend to each key, without a [H, W, S] array.

Axes: B batch, S prompt tokens, W observation rows, H query heads, G key/value heads, E head width.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from gemfilter_jax.ops import Normalisation
from gemfilter_jax.ops.attention.visibility import refuse_positions
from gemfilter_jax.ops.dispatch import Dispatcher
from gemfilter_jax.parallel import collectives
from gemfilter_jax.parallel.shards import SequenceShards

Implementation = Literal["pallas", "xla"]
Merge = Callable[[jax.Array], jax.Array]
"""Turns the rows' references [B, ...] over the local keys into references over all keys."""

_DISPATCHER = Dispatcher("key scores", {"pallas": None, "xla": None}, {"tpu": ("pallas", "xla")})
_ROW_BLOCK = 64  # observation rows at a time in `score_keys_by_all_rows`
_BLOCK = 1024  # keys scored at a time; bounds the logits to [B, H, W, block]
_LARGEST_EXPONENT = 60.0  # e^60 summed over all rows and heads still fits float32


def score_keys(
    q: jax.Array,
    rows: jax.Array,
    k: jax.Array,
    *,
    head_weights: jax.Array,
    normalisation: Normalisation,
    window: jax.typing.ArrayLike | None = None,
    positions: jax.Array | None = None,
    scale: float | None = None,
    sequence: SequenceShards | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """The score of every key, summed over observation rows and weighted heads.

    Args:
      q: [B, W, H, E], queries after rotary. rows: int [B, W], their indices below S; negative rows do not count.
      k: [B, S, G, E], keys after rotary.
      head_weights: float [H], or [N, H] for N weightings at once: `jnp.eye(H)` gives each head's own scores,
        `jnp.repeat(jnp.eye(G), H // G, axis=1)` gives each key head's.
      normalisation: how inner products become scores. Except under "none", a row sees keys up to its own position.
        "none": raw inner products without scale, over all keys (GemFilter, arXiv 2409.17422, section 3). This is one
        product of the summed queries with the keys. XLA runs it at memory speed, so it has no kernel.
        "softmax": attention probabilities.
        "sink": exp(logit - logit of key 0). Unlike each segment's own softmax, this is comparable between segments
        that share their first tokens.
      window: how many keys a row sees, its own included, may be traced; None for all before it. Not for "none".
      positions: int [B, S], increasing along a row; `window` counts these positions. None for 0 to S - 1.
      scale: factor of the inner products; None for E**-0.5. Not for "none".
      sequence: how the surrounding program shards keys over the mesh's seq axis; k and the scores are then this
        device's shard. None if k is whole. If heads are sharded, q, k and `head_weights` are this device's shard.
      implementation: "pallas" for the platform's kernel (TPU, or NVIDIA Hopper on a GPU), "xla", or None. On TPU, None
        takes the kernel if there is one device or the call is inside a `shard_map`, because XLA cannot partition a
        kernel. Elsewhere, and for inputs that the kernel does not support, None takes "xla". The GPU kernel's results
        have not been compared on hardware yet.

    Returns:
      float32 [B, S], or [B, N, S] for N weightings. Under "none" padding keys score too: mask them by length.

    Raises:
      UserError: the named implementation does not support the call; the message gives the reason.
      NotImplementedError: sharded keys are given together with a window.
    """
    with jax.named_scope("scoring"):
        weighted = head_weights.astype(jnp.float32)
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        if sequence is not None and sequence.axis_size > 1 and normalisation != "none":
            from_sink = normalisation == "sink"
            scores = _scores_of_shard(q, rows, k, weighted, from_sink, window, factor, sequence, implementation)
        else:
            scores = _scores(q, rows, k, weighted, normalisation, window, factor, implementation, positions)
        return collectives.psum(scores, "model")


def _scores(
    q: jax.Array,
    rows: jax.Array,
    k: jax.Array,
    head_weights: jax.Array,
    normalisation: Normalisation,
    window: jax.typing.ArrayLike | None,
    scale: float,
    implementation: Implementation | None,
    positions: jax.Array | None = None,
    merge: Merge | None = None,
) -> jax.Array:
    if normalisation == "none":
        groups = k.shape[2]
        counted = reduce(q.astype(jnp.float32) * (rows >= 0)[..., None, None], "b w h e -> b h e", "sum")
        counted = rearrange(counted, "b (g r) e -> b g r e", g=groups)
        summed = jnp.einsum("bgre,...gr->b...ge", counted, _by_group(head_weights, groups), precision="highest")
        return jnp.einsum("b...ge,bsge->b...s", summed, k, precision="highest", preferred_element_type=jnp.float32)

    def serve(name: str) -> jax.Array:
        masses = functools.partial(_masses, positions=positions)
        if name == "pallas":
            if implementation is None:
                _refuse_what_xla_would_partition()
            refuse_positions(positions, window)
            masses = _kernels().masses
        return masses(
            q,
            rows,
            k,
            head_weights,
            from_sink=normalisation == "sink",
            window=window,
            scale=scale,
            largest_exponent=_LARGEST_EXPONENT,
            merge=merge,
        )

    return _DISPATCHER.first_that_serves(serve, implementation)


def _scores_of_shard(
    q: jax.Array,
    rows: jax.Array,
    k: jax.Array,
    head_weights: jax.Array,
    from_sink: bool,
    window: jax.typing.ArrayLike | None,
    scale: float,
    sequence: SequenceShards,
    implementation: Implementation | None,
) -> jax.Array:
    """Scores of this device's shard of the keys. Pieces form a batch; each row's reference covers all shards."""
    if window is not None:
        raise NotImplementedError("sharded keys are scored without a window")
    starts = sequence.starts(k.shape[1])
    size = k.shape[1] // sequence.pieces

    def merge(reference: jax.Array) -> jax.Array:
        of_pieces = rearrange(reference, "(p b) ... -> p b ...", p=sequence.pieces)
        if from_sink:
            first = (starts == 0).reshape(-1, *(1,) * (of_pieces.ndim - 1))
            merged = collectives.psum(jnp.where(first, of_pieces, 0.0).sum(axis=0), "seq")
        else:
            peak = collectives.pmax(of_pieces.max(axis=0), "seq")
            finite = jnp.where(jnp.isfinite(peak), peak, 0.0)
            merged = finite + jnp.log(collectives.psum(jnp.exp(of_pieces - finite).sum(axis=0), "seq"))
        return jnp.tile(merged, (sequence.pieces, *(1,) * (merged.ndim - 1)))

    within = rows - starts[:, None, None]
    within = jnp.where(rows >= 0, jnp.clip(within, -1, size - 1), -1)
    scores = _scores(
        jnp.tile(q, (sequence.pieces, 1, 1, 1)),
        rearrange(within, "p b w -> (p b) w"),
        rearrange(k, "b (p s) g e -> (p b) s g e", p=sequence.pieces),
        head_weights,
        "sink" if from_sink else "softmax",
        None,
        scale,
        implementation,
        merge=merge,
    )
    return rearrange(scores, "(p b) ... s -> b ... (p s)", p=sequence.pieces)


def score_keys_by_all_rows(
    q: jax.Array,
    lengths: jax.Array,
    k: jax.Array,
    *,
    head_weights: jax.Array,
    normalisation: Normalisation,
    window: jax.typing.ArrayLike | None = None,
    positions: jax.Array | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """`score_keys` with every row of right-padded prompts as an observation row, as in H2O (arXiv 2306.14048).

    Args:
      q: [B, S, H, E]. lengths: int [B]; rows past them do not count. Other arguments as in `score_keys`.

    Returns:
      float32 [B, S], or [B, N, S] for N weightings.
    """
    length = q.shape[1]
    block = min(_ROW_BLOCK, length)

    def add(index, scores):
        start = jnp.minimum(index * block, length - block)
        rows = start + jnp.arange(block)
        counted = (rows >= index * block) & (rows < lengths[:, None])
        return scores + score_keys(
            jax.lax.dynamic_slice_in_dim(q, start, block, axis=1),
            jnp.where(counted, rows, -1),
            k,
            head_weights=head_weights,
            normalisation=normalisation,
            window=window,
            positions=positions,
            scale=scale,
            implementation=implementation,
        )

    nothing = jnp.zeros((len(q), *head_weights.shape[:-1], length), jnp.float32)
    return jax.lax.fori_loop(0, (jnp.max(lengths) + block - 1) // block, add, nothing)


def _kernels() -> ModuleType:
    """The platform's kernel module, imported on use: Pallas takes a quarter of a second to import."""
    if collectives.platform() == "gpu":
        from gemfilter_jax.pallas_kernels import gpu

        return gpu
    from gemfilter_jax.pallas_kernels import tpu

    return tpu


def _refuse_what_xla_would_partition() -> None:
    if jax.device_count() > 1 and not jax.sharding.get_abstract_mesh().manual_axes:
        raise NotImplementedError(f"XLA cannot partition a kernel over this process's {jax.device_count()} devices")


def _masses(
    q: jax.Array,
    rows: jax.Array,
    k: jax.Array,
    head_weights: jax.Array,
    *,
    from_sink: bool,
    window: jax.typing.ArrayLike | None,
    scale: float,
    largest_exponent: float,
    merge: Merge | None,
    positions: jax.Array | None = None,
) -> jax.Array:
    length, groups = k.shape[1], k.shape[2]
    block = min(_BLOCK, length)
    key_blocks = jnp.pad(k, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
    key_blocks = rearrange(key_blocks, "b (n s) g e -> n b g s e", s=block)
    queries = rearrange(q.astype(jnp.float32) * scale, "b w (g r) e -> b g r w e", g=groups)

    own = rows if positions is None else jnp.take_along_axis(positions, jnp.maximum(rows, 0), axis=1)
    places = jnp.arange(length)[None] if positions is None else positions
    places = jnp.pad(places, ((0, 0), (0, -length % block)))

    def logits(index, keys):
        products = jnp.einsum("bgrwe,bgse->bgrws", queries, keys.astype(jnp.float32), precision="highest")
        seen = rows[..., None] >= index * block + jnp.arange(block)
        if window is not None:
            of_keys = jax.lax.dynamic_slice_in_dim(places, index * block, block, axis=1)
            seen &= own[..., None] - of_keys[:, None] < window
        return jnp.where(seen[:, None, None], products, -jnp.inf)

    numbered = (jnp.arange(len(key_blocks)), key_blocks)
    if from_sink:
        sink = k[:, 0].astype(jnp.float32)
        reference = jnp.einsum("bgrwe,bge->bgrw", queries, sink, precision="highest")
    else:
        per_block = jax.lax.map(lambda x: jax.nn.logsumexp(logits(*x), axis=-1), numbered)
        reference = jax.nn.logsumexp(per_block, axis=0)
    reference = reference if merge is None else merge(reference)

    weights = _by_group(head_weights, groups)

    def mass(numbered_block):
        relative = logits(*numbered_block) - jnp.where(jnp.isfinite(reference), reference, 0.0)[..., None]
        return jnp.einsum("bgrws,...gr->b...s", jnp.exp(jnp.minimum(relative, largest_exponent)), weights)

    return rearrange(jax.lax.map(mass, numbered), "n b ... s -> b ... (n s)")[..., :length]


def _by_group(head_weights: jax.Array, groups: int) -> jax.Array:
    """[..., H] -> [..., G, H / G]."""
    return rearrange(head_weights, "... (g r) -> ... g r", g=groups)
