"""GemFilter: its settings, what they may be, and how its steps are called."""

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

from gemfilter_jax import settings
from gemfilter_jax.errors import UserError
from gemfilter_jax.methods.base import Kept, Method, Order, Pooling, Progress
from gemfilter_jax.ops import Normalisation
from gemfilter_jax.settings import option

if TYPE_CHECKING:
    from gemfilter_jax.config import ModelConfig
    from gemfilter_jax.methods.gemfilter.documents import DocumentReader
    from gemfilter_jax.methods.presets import Preset
    from gemfilter_jax.models.transformer import Decoder
    from gemfilter_jax.text.prompt import Prompt
    from gemfilter_jax.timing import Stopwatch

FilterAttention = Literal["auto", "dense", "tri_shape"]
FilterPrecision = Literal["float", "int8"]

AUTO = "auto"
"""The budget of as many tokens as probably hold the answer, up to the preset's `keep`; see `recall` and `share`."""

AUTO_RECALL = 0.9
"""The probability that the answer is in what is kept, where passages are ranked as wholes, under that budget."""

SHARE_OF_ATTENTION = 0.3
"""The share of the attention that is kept under that budget otherwise."""

_FORMER_NAMES = {"window": "observation_window", "kernel": "pool_size"}
_FITTED = ("lexical", "carry", "sharpness", "chunk", "sentences", "normalisation")  # what a `recall_fit` holds for
_LEAST_ODDS = 1e-4  # scores are float32, and no estimate is surer
_MOST = 700.0  # whose exponential is a finite float
_HEAD = re.compile(r"(\d{1,9})/(\d{1,9})(?::(\d*\.?\d+))?", re.ASCII)

_Class = TypeVar("_Class", bound=type)


@dataclasses.dataclass(frozen=True)
class Head:
    """A query head whose attention counts.

    Attributes:
      layer, head: counted from 0.
      weight: above 0.
    """

    layer: int
    head: int
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Head | None":
        """A head written as "17/0", layer 17's first head, or with a weight as "17/0:0.5"; None if it is not."""
        parts = _HEAD.fullmatch(str(text))
        if not parts or (parts[3] and not float(parts[3])):
            return None
        return cls(int(parts[1]), int(parts[2]), float(parts[3] or 1))

    def __str__(self) -> str:
        return f"{self.layer}/{self.head}" + ("" if self.weight == 1 else f":{self.weight:g}")


def log_odds(probability: float) -> float:
    """Finite for probabilities of 0 and 1 too."""
    inside = min(max(probability, _LEAST_ODDS), 1 - _LEAST_ODDS)
    return math.log(inside / (1 - inside))


def _logistic(log_odds: float) -> float:
    return 1 / (1 + math.exp(min(-log_odds, _MOST)))


def _lenient(owner: _Class) -> _Class:
    """Let a dataclass's constructor, and `dataclasses.replace`, take former names, lists and NumPy's numbers."""
    init = owner.__init__

    @functools.wraps(init)
    def taking(self: Any, *args: Any, **fields: Any) -> None:
        named = {name: settings.plain(value) for name, value in _renamed(fields).items()}
        init(self, *map(settings.plain, args), **named)

    owner.__init__ = taking
    return owner


def _renamed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields under their present names; of a field given under both the former name counts, see `replace`."""
    former = {name: fields[old] for old, name in _FORMER_NAMES.items() if old in fields}
    return {name: value for name, value in fields.items() if name not in _FORMER_NAMES} | former


@_lenient
@dataclasses.dataclass(frozen=True)
class GemFilter(Method):
    """Keep the tokens that one early layer attends to from the end of the prompt (arXiv 2409.17422).

    The defaults are this project's default rule; `GemFilter.paper` is the published one. `observation_window` and
    `pool_size` were called `window` and `kernel`; those names still serve.

    With `heads` or `lexical` a passage is ranked as a whole, by the sum of what each head and the words that it shares
    with the question say of it, see `fusion.ranking`, and of a part of what they say of the passage before.

    Attributes:
      filter_layer: r, 0-based: layers 0..r-1 run, layer r's keys and queries score, and those of `heads`.
      keep: K, tokens kept, required ones included.
      share: keep no more chunks than hold this share of the document's attention, rounded up to a bucket, instead of K
        tokens in any case; None for K. For methods without `heads` and `lexical`.
      recall: keep no more passages than hold the answer with this probability, rounded up and bounded likewise; None
        for K. For methods with `heads` or `lexical`.
      recall_fit: what makes a share of the evidence a probability, see `recall_of`: a logistic regression's intercept,
        and weights of the share's log odds and of the logarithm of the number of passages, from `gemfilter calibrate`;
        None where it is not known.
      least: tokens kept at least where `share` or `recall` decides.
      observation_window: W, observation rows at the end of the prompt, none of them before the question.
      normalisation: see `key_scores.score_keys`; prompts cut into segments are scored with "sink" in place of
        "softmax".
      head_weights: one weight for each query head of layer r, or None for all heads alike.
      heads: heads of layers up to r in place of layer r's, as "layer/head" or "layer/head:weight"; None for layer r's.
      lexical: weight of the words that a passage shares with the question, see `lexical.scores`; 0 for attention alone.
      carry: part of the score of a passage that the passage after it gets besides its own, with `heads` or `lexical`:
        answers follow headings, questions and names that the question is about.
      sharpness: how strongly a difference of such scores counts as evidence, see `fusion.kept`; a preset's, and its
        `recall_fit`, are right for its own heads and weight of words.
      pooling, pool_size: neighbours pooled before ranking, without `heads` and `lexical`.
      chunk: P, at most so many tokens are ranked and kept together.
      sentences: chunks are sentences and other passages, see `chunking.passage_ends`; those beyond P tokens are cut
        evenly. Else P tokens each.
      keep_required: always keep the template, the question and the assistant header.
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

    variants: ClassVar[Mapping[str, str]] = {
        "default": "GemFilter by this project's rule and the model's preset",
        "paper": "GemFilter as published",
        "uncalibrated": "the default rule at the paper's layer, with all heads alike",
    }

    filter_layer: int = option(help="Layer whose attention picks the tokens, counted from 0.", at_least=0)
    keep: int = option(1024, "Tokens to keep.", at_least=1)
    share: float | None = option(None, "Share of the attention that the kept chunks hold.", above=0, at_most=1)
    recall: float | None = option(
        None, "Keep no more tokens than hold the answer with this probability, at most keep.", above=0, at_most=1
    )
    recall_fit: tuple[float, ...] | None = option(None, "Logistic regression that makes shares probabilities.")
    least: int = option(256, "Tokens to keep at least where share or recall decides.", at_least=1)
    observation_window: int = option(32, "Last tokens of the question whose attention is counted.", at_least=1)
    normalisation: Normalisation = option("softmax", "Normalisation of the attention that is counted.")
    head_weights: tuple[float, ...] | None = option(None, "Weight of each query head.", at_least=0)
    heads: tuple[str, ...] | None = option(None, "Heads of several layers, as layer/head or layer/head:weight.")
    lexical: float = option(0.7, "Weight of the words shared with the question; 0 for attention alone.", at_least=0)
    carry: float = option(0.2, "Part of a passage's score that the next one gets besides its own.", at_least=0)
    sharpness: float = option(1.0, "Evidence in a unit of score, for keep=auto.", above=0)
    pooling: Pooling = option("max", "Pooling of the scores of neighbours.")
    pool_size: int = option(9, "Neighbours that are pooled.", at_least=1)
    chunk: int = option(64, "Tokens that are kept together, at most.", at_least=1)
    sentences: bool = option(True, "Keep whole sentences, list items, rows and the like together.")
    keep_required: bool = option(True, "Always keep the template and the question.", stored=False)
    filter_attention: FilterAttention = option(
        "auto",
        "Attention of the layers below the filter layer: tri_shape costs time linear in the prompt; auto takes it for "
        "long prompts.",
    )
    band: int = option(512, "Preceding tokens that each token attends to under tri_shape.", at_least=1)
    first_tokens: int = option(64, "First tokens that each token attends to under tri_shape.", at_least=0)
    filter_precision: FilterPrecision = option(
        "float", "Precision of matrix products below the filter layer; float is the model's own."
    )
    segment: int | None = option(None, "Tokens of a segment of a long prompt.", at_least=1)
    rounds: tuple[int, ...] = option((), "Tokens left after each pass but the last.", at_least=1)
    order: Order = option(
        "best_last", "Order of the kept passages in the answering prompt: as in the text, or the best one last."
    )
    positions: Literal["compact", "original"] = option("compact", "Positions of the kept tokens.", stored=False)

    @classmethod
    def paper(cls, filter_layer: int, keep: int = 1024) -> Self:
        """The published rule: one row, raw inner products over all heads, mean of 5 neighbours, single tokens."""
        return cls(
            filter_layer=filter_layer,
            keep=keep,
            observation_window=1,
            normalisation="none",
            lexical=0.0,
            carry=0.0,
            pooling="mean",
            pool_size=5,
            chunk=1,
            sentences=False,
            keep_required=False,
            filter_attention="dense",
            order="text",
        )

    @classmethod
    def of(cls, variant: str, preset: "Preset", **given: Any) -> Self:
        """See `Preset.method`."""
        own = cls._own(given)
        for name in ("lexical", "carry") if variant == "paper" else ():
            if own.get(name):
                raise UserError(f"{name} is {own[name]}; under the paper's rule only attention counts")
        method = preset.method(variant, own.pop("keep", None), own.pop("filter_layer", None))
        if own.keys() & {"heads", "head_weights"}:
            method = dataclasses.replace(
                method, heads=None, head_weights=None, sharpness=cls.sharpness, recall_fit=None
            )
        if any(name in own and own[name] != getattr(method, name) for name in _FITTED):
            method = dataclasses.replace(method, recall_fit=None)
        made = cls(**dataclasses.asdict(method) | own)
        if made.ranks_passages and made.share is not None and "share" not in own:
            return dataclasses.replace(made, share=None, recall=made.recall or AUTO_RECALL)
        if not made.ranks_passages and made.recall is not None and "recall" not in own:
            return dataclasses.replace(made, recall=None, share=made.share or SHARE_OF_ATTENTION)
        return made

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], config: "ModelConfig", source: str) -> Self:
        """See `Method.from_fields`."""
        for former, name in _FORMER_NAMES.items():
            if former in fields and name in fields:
                raise UserError(f"{source}: fields {former!r} and {name!r} mean the same; give one of them")
        fields = {"lexical": 0.0, "carry": 0.0} | _renamed(fields)  # written before these counted
        if "filter_layer" not in fields:
            raise UserError(f"{source}: field 'filter_layer' is missing")
        method = cls(**settings.from_json(cls, fields, source))
        if method.ranks_passages and method.share is not None and method.recall is None:  # written before there was one
            method = dataclasses.replace(method, share=None, recall=method.share)
        if method.filter_layer >= config.layers:
            raise UserError(
                f"{source}: field 'filter_layer' is {method.filter_layer}; the model has layers 0 to "
                f"{config.layers - 1}"
            )
        if fault := method._fault(config):
            raise UserError(f"{source}: {fault}")
        return method

    def check(self, model: "Decoder") -> None:
        """See `Method.check`."""
        config = model.config
        if isinstance(self.filter_layer, int) and not 0 <= self.filter_layer < config.layers:
            raise UserError(
                f"filter layer {self.filter_layer} is out of range; the model has layers 0 to {config.layers - 1}"
            )
        super().check(model)
        if self.filter_layer >= model.held_layers:
            raise UserError(
                f"filter layer {self.filter_layer} is beyond the first {model.held_layers} layers, which alone are "
                "loaded"
            )
        if fault := self._fault(config):
            raise UserError(fault)

    def _fault(self, config: "ModelConfig") -> str | None:
        """What is wrong with options that are right by themselves; None if nothing is."""
        import numpy as np

        if self.share is not None and (self.normalisation == "none" or self.ranks_passages):
            return f"share is {self.share}, which needs attention alone and a normalisation other than 'none'"
        if self.recall is not None and not self.ranks_passages:
            return f"recall is {self.recall}, which needs heads of several layers, or shared words"
        if self.recall_fit is not None and (len(self.recall_fit) != 3 or self.recall_fit[1] <= 0):
            return f"recall_fit is {self.recall_fit}; expected three numbers, the second above 0"
        if self.order == "best_last" and self.positions == "original":
            return "original positions need order 'text'"
        if self.ranks_passages and (self.chunk == 1 or self.normalisation == "none"):
            return "heads of several layers, and shared words, need chunks and a normalisation other than 'none'"
        if self.heads is not None:
            return self._fault_of_heads(config)
        if self.head_weights is None:
            return None
        with np.errstate(over="ignore", under="ignore"):
            held = np.asarray(self.head_weights, np.float32)
        if len(held) == config.heads and np.isfinite(held).all() and held.any():
            return None
        return (
            f"{len(held)} head weights were given; expected a number that float32 holds for each of {config.heads} "
            "query heads, not all 0"
        )

    def _fault_of_heads(self, config: "ModelConfig") -> str | None:
        if self.head_weights is not None:
            return "head_weights and heads were given; give one of them"
        for one in self.heads or ():
            head = Head.parse(one)
            if head is None or head.layer > self.filter_layer or head.head >= config.heads:
                return (
                    f"head {one!r} was given; expected layer/head or layer/head:weight, with layers up to the filter "
                    f"layer, {self.filter_layer}, and heads 0 to {config.heads - 1}"
                )
        places = [(head.layer, head.head) for head in self.chosen_heads]
        return None if places and len(set(places)) == len(places) else "heads is empty or names one twice"

    @property
    def chosen_heads(self) -> tuple[Head, ...]:
        """What `heads` says; empty where layer r's serve."""
        return tuple(head for one in self.heads or () if (head := Head.parse(one)))

    @property
    def looks_at(self) -> tuple[int, ...]:
        """The layers whose attention counts; the filter stops at the last of them."""
        return tuple(sorted({head.layer for head in self.chosen_heads})) or (self.filter_layer,)

    @property
    def ranks_passages(self) -> bool:
        """Whether passages are ranked as wholes, see `fusion.ranking`, and not by their tokens' scores."""
        return self.heads is not None or self.lexical > 0

    def recall_of(self, share: float, passages: int) -> float | None:
        """The probability that those of so many passages that have this share of the evidence hold the answer.

        None where it is not known.
        """
        if not self.ranks_passages or self.recall_fit is None:
            return None
        intercept, of_share, of_passages = self.recall_fit
        return _logistic(intercept + of_share * log_odds(share) + of_passages * math.log(max(passages, 1)))

    def share_for(self, recall: float, passages: int) -> float:
        """The share that has this `recall_of`; where that is not known, about the recall itself."""
        intercept, of_share, of_passages = self.recall_fit or (0.0, 1.0, 0.0)
        return _logistic((log_odds(recall) - intercept - of_passages * math.log(max(passages, 1))) / of_share)

    def check_prompt(self, model: "Decoder", prompt: "Prompt") -> None:
        """Raise a `UserError` if the method cannot serve this model and prompt."""
        from gemfilter_jax.methods.gemfilter import segments

        self.check(model)
        for keep in (*self.rounds, self.keep) if self.keep_required else ():
            self.check_required(prompt, keep)
        segments.check_room(model.config, prompt, self)
        if len(prompt) > model.config.context and self.positions == "original":
            raise UserError(
                f"original positions need a prompt within the model's context of {model.config.context} tokens, "
                f"this one has {len(prompt)}"
            )

    @property
    def budget(self) -> int:
        """K."""
        return self.keep

    @property
    def keep_shown(self) -> int | str:
        """K, or "auto" where a share or a probability decides."""
        return self.keep if self.share is None and self.recall is None else AUTO

    @property
    def observation_rows(self) -> int:
        """W."""
        return self.observation_window

    @property
    def keeps_positions(self) -> bool:
        """See `positions`."""
        return self.positions == "original"

    @property
    def window(self) -> int:
        """The former name of `observation_window`."""
        return self.observation_window

    @property
    def kernel(self) -> int:
        """The former name of `pool_size`."""
        return self.pool_size

    def select(
        self,
        model: "Decoder",
        prompts: "Sequence[Prompt]",
        *,
        watch: "Stopwatch",
        progress: Progress | None = None,
    ) -> list[Kept]:
        """Stage 1; see `filtering.keep_tokens`."""
        from gemfilter_jax.methods.gemfilter import filtering

        with watch.stage("filter"):
            return filtering.keep_tokens(model, prompts, self, progress=progress)

    def reader(self, model: "Decoder", cache: pathlib.Path | None) -> "DocumentReader":
        """Reads the document once."""
        from gemfilter_jax.methods.gemfilter.documents import DocumentReader

        return DocumentReader(self, model, cache)

    def work(self, config: "ModelConfig") -> str:
        """Layer r."""
        return f"layer {self.looks_at[-1]} of {config.layers} picked"
