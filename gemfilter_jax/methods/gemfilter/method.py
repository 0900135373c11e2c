"""What to keep of a prompt, as frozen hashable policies."""

import dataclasses
from typing import Literal

from gemfilter_jax.methods.gemfilter.selection import Pooling
from gemfilter_jax.ops.key_scores import Normalisation

FilterAttention = Literal["auto", "dense", "tri_shape"]
FilterPrecision = Literal["float", "int8"]
Order = Literal["text", "best_last"]


@dataclasses.dataclass(frozen=True)
class Full:
    """Keep everything: full attention, the baseline."""


@dataclasses.dataclass(frozen=True)
class GemFilter:
    """Keep the tokens that one early layer attends to from the end of the prompt (arXiv 2409.17422).

    The defaults are this project's default rule; `GemFilter.paper` is the published one.

    Attributes:
      filter_layer: r, 0-based: layers 0..r-1 run, layer r's keys and queries score.
      keep: K, tokens kept, required ones included.
      share: keep no more chunks than hold this share of the document's score, rounded up to a bucket, instead of K
        tokens in any case; None for K.
      least: tokens kept at least where `share` decides.
      window: W, observation rows at the end of the prompt, none of them before the question.
      normalisation: see `scoring.score_keys`; prompts cut into segments are scored with "sink" in place of "softmax".
      head_weights: one weight for each query head, or None for all heads alike.
      pooling, kernel: neighbours pooled before ranking.
      chunk: P, at most so many tokens are ranked and kept together.
      sentences: chunks are whole sentences, of which those beyond P tokens are cut evenly; else P tokens each.
      keep_required: always keep the template's head, the question and the assistant header.
      filter_attention: of the layers before r: "dense" as published, "tri_shape" (each row sees `first_tokens`, a
        `band` of keys before it, and the last rows see everything), which is linear in S, or "auto", tri_shape for
        prompts of more than twice the band.
      band, first_tokens: see `attention.TriShape`.
      filter_precision: of matrix products up to the scores: "float", the model's own, or "int8", see `Decoder.in_int8`.
      segment: S, a longer prompt is read in segments of at most so many tokens, template and question included; None
        for a little more than half of the model's context. Does not hold where `normalisation` is "none".
      rounds: of a prompt in segments, the tokens that are left for each further pass through the filter;
        none if the first pass chooses the K.
      order: of the kept passages in stage 2: "text", as they stand there, as published, or "best_last", the one of the
        highest score next to the question.
      positions: rotary positions of the kept tokens in stage 2: "compact" (0..K-1, as published) or "original".
    """

    filter_layer: int
    keep: int = 1024
    share: float | None = None
    least: int = 256
    window: int = 32
    normalisation: Normalisation = "softmax"
    head_weights: tuple[float, ...] | None = None
    pooling: Pooling = "max"
    kernel: int = 9
    chunk: int = 64
    sentences: bool = True
    keep_required: bool = True
    filter_attention: FilterAttention = "auto"
    band: int = 512
    first_tokens: int = 64
    filter_precision: FilterPrecision = "float"
    segment: int | None = None
    rounds: tuple[int, ...] = ()
    order: Order = "best_last"
    positions: Literal["compact", "original"] = "compact"

    @classmethod
    def paper(cls, filter_layer: int, keep: int = 1024) -> "GemFilter":
        """The published rule: one row, raw inner products over all heads, mean of 5 neighbours, single tokens."""
        return cls(
            filter_layer=filter_layer,
            keep=keep,
            window=1,
            normalisation="none",
            pooling="mean",
            kernel=5,
            chunk=1,
            sentences=False,
            keep_required=False,
            filter_attention="dense",
            order="text",
        )


Method = Full | GemFilter
