"""Calibration: finds the layer and the heads of a model that pick hidden facts, and makes a preset of them.

Each document passes once through the candidate layers, and the score of each chunk by each head is recorded. Head
weights are then learned with optax on one set of documents and measured on another.

Axes: N documents, L layers, H heads, C chunks.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemfilter_jax.buckets import bucket
from gemfilter_jax.errors import UserError
from gemfilter_jax.evals.example import Example
from gemfilter_jax.evals.summary import wilson
from gemfilter_jax.evals.task import WHOLE
from gemfilter_jax.evals.tasks import hidden_facts
from gemfilter_jax.generate import loop
from gemfilter_jax.methods import passages, selection
from gemfilter_jax.methods.gemfilter import scoring_pass
from gemfilter_jax.methods.gemfilter.method import FilterAttention, FilterPrecision, GemFilter
from gemfilter_jax.methods.presets import AUTO_SHARE, Preset
from gemfilter_jax.parallel import collectives, sharding
from gemfilter_jax.pipeline import Pipeline
from gemfilter_jax.text.prompt import encode

_STEPS = 300
_LEARNING_RATE = 0.1
_SPARSITY = 0.02  # weight of the sparsity penalty in the loss; it drives heads that add nothing to 0
_SMALLEST_SHARE = 0.03  # heads with a smaller share of the chunk scores are dropped
_EMPTY = 1e-9  # keeps logarithms of scores finite
_MASKED = -1e9  # finite, so that gradients stay finite

_rank = jax.jit(selection.rank, static_argnames=("pooling", "pool_size"))


@dataclasses.dataclass(frozen=True)
class Recorded:
    """The recorded scores of one document with a question.

    Attributes:
      scores: float32 [L, H, C], score of each chunk by each head alone.
      sizes: int [C], tokens in each chunk.
      facts: bool [F, C], the chunks that hold each of the F facts in question.
      required: number of prefix and suffix tokens, which are always kept.
    """

    scores: np.ndarray
    sizes: np.ndarray
    facts: np.ndarray
    required: int


def record(model: Pipeline, example: Example, method: GemFilter, layers: int) -> Recorded:
    """Record the chunk scores of every head of the first `layers` layers in an example.

    Args:
      example: must fit the model's context.
      method: sets the observation window, pooling, chunks, attention and precision.
    """
    prompt = encode(
        model.checkpoint.tokenizer,
        example.text,
        example.question,
        observation_rows=method.observation_rows,
        chat_template=model.chat_template,
        message_format=model.message_format,
    )
    width = bucket(len(prompt))
    rows = sharding.evenly([prompt], sharding.shape_of(model.checkpoint.model.mesh).rows)
    ids, lengths = loop.pad([row.ids for row in rows], width)
    suffix_lengths = np.array([row.suffix_length for row in rows], np.int32)
    scoring = scoring_pass.ScoringPass.of(
        method,
        model.checkpoint.model.config.heads,
        document=len(prompt) - prompt.prefix_length - prompt.suffix_length,
        suffix_lengths=suffix_lengths,
    )
    of_rows = scoring_pass.score_heads(
        model.checkpoint.model, ids, lengths, jnp.asarray(suffix_lengths), scoring, layers=layers
    )
    scores = collectives.to_host(of_rows)[:, 0].reshape(-1, width)
    numbers = np.full(width, len(prompt))
    numbers[: len(prompt)] = passages.chunks(prompt, passages.PassageRule.of(method))
    required = np.ones(width, bool)
    required[: len(prompt)] = prompt.required

    def for_each_head(row: np.ndarray) -> jax.Array:
        return jnp.broadcast_to(row, scores.shape)

    ranked = _rank(
        scores,
        jnp.broadcast_to(lengths[:1], len(scores)),
        required=for_each_head(required),
        pooling=method.pooling,
        pool_size=method.pool_size,
        chunks=for_each_head(numbers),
    )
    free = np.flatnonzero(~required)
    _, first, sizes = np.unique(numbers[free], return_index=True, return_counts=True)
    starts, ends = prompt.offsets[free[first], 0], prompt.offsets[free[first + sizes - 1], 1]
    return Recorded(
        scores=np.asarray(ranked[:, free[first]]).reshape(layers, -1, len(sizes)),
        sizes=sizes,
        facts=np.stack([_holders(starts, ends, span) for span in example.spans]),
        required=prompt.prefix_length + prompt.suffix_length,
    )


def _holders(starts: np.ndarray, ends: np.ndarray, span: tuple[int, int]) -> np.ndarray:
    """bool [C], chunks that hold more than 1 - `WHOLE` of a fact, so that the fact is not kept without them."""
    overlap = np.maximum(np.minimum(ends, span[1]) - np.maximum(starts, span[0]), 0)
    return overlap > (1 - WHOLE) * (span[1] - span[0])


@dataclasses.dataclass(frozen=True)
class HeadSet:
    """Heads and their weights.

    Attributes:
      layers, heads: layer and index of each head.
      weights: weight of each head, above 0; the largest is 1.
    """

    layers: tuple[int, ...]
    heads: tuple[int, ...]
    weights: tuple[float, ...]

    def scores(self, recorded: Recorded) -> np.ndarray:
        """float32 [C], the weighted score of each chunk."""
        return np.asarray(self.weights, np.float32) @ recorded.scores[list(self.layers), list(self.heads)]

    def of_layer(self, layer: int, heads: int) -> tuple[float, ...]:
        """The weight of every head of one layer, float [H]."""
        weights = dict(zip(zip(self.layers, self.heads, strict=True), self.weights, strict=True))
        return tuple(weights.get((layer, head), 0.0) for head in range(heads))


def learn(recorded: Sequence[Recorded], layers: Sequence[int]) -> HeadSet:
    """Learn weights of the heads of some layers that rank the chunks with facts first.

    A chunk's score s is the weighted sum of the heads' scores. The loss is the cross-entropy of softmax(t ln s) over a
    document's chunks against the chunks with facts, with a learned sharpness t, plus a small sparsity penalty on heads.
    """
    longest = max(len(one.sizes) for one in recorded)
    shape = (len(recorded), len(layers), recorded[0].scores.shape[1], longest)
    scores = np.zeros(shape, np.float32)
    most = max(len(one.facts) for one in recorded)
    facts = np.zeros((len(recorded), most, longest), bool)
    for row, one in enumerate(recorded):
        scores[row, ..., : len(one.sizes)] = one.scores[list(layers)]
        facts[row, : len(one.facts), : len(one.sizes)] = one.facts
    scores = scores.reshape(len(recorded), -1, longest)
    scale = 1 / (scores.max(axis=-1).mean(axis=0) + _EMPTY)  # so that all heads start equal
    real = jnp.asarray(scores.max(axis=1) > 0)
    asked = jnp.asarray(facts.any(axis=-1))
    scaled, wanted = jnp.asarray(scores * scale[:, None]), jnp.asarray(facts)

    def loss(parameters: dict[str, jax.Array]) -> jax.Array:
        shares = jax.nn.softmax(parameters["heads"])
        logits = jnp.exp(parameters["sharpness"]) * jnp.log(jnp.einsum("k,nkc->nc", shares, scaled) + _EMPTY)
        likely = jax.nn.log_softmax(jnp.where(real, logits, _MASKED), axis=-1)
        of_fact = jax.nn.logsumexp(jnp.where(wanted, likely[:, None], _MASKED), axis=-1)
        mean = jnp.where(asked, -of_fact, 0.0).sum() / asked.sum()
        return mean + _SPARSITY * jnp.sqrt(shares).sum()

    parameters = {"heads": jnp.zeros(scaled.shape[1]), "sharpness": jnp.zeros(())}
    optimiser = optax.adam(_LEARNING_RATE)

    def step(_, carry):
        parameters, state = carry
        updates, state = optimiser.update(jax.grad(loss)(parameters), state)
        return optax.apply_updates(parameters, updates), state

    run = jax.jit(lambda parameters: jax.lax.fori_loop(0, _STEPS, step, (parameters, optimiser.init(parameters)))[0])
    shares = np.asarray(jax.nn.softmax(run(parameters)["heads"]))
    used = np.flatnonzero(shares >= min(_SMALLEST_SHARE, shares.max()))
    weights = (shares * scale)[used]
    heads = shape[2]
    return HeadSet(
        layers=tuple(int(layers[index // heads]) for index in used),
        heads=tuple(int(index % heads) for index in used),
        weights=tuple(round(float(weight), 4) for weight in weights / weights.max()),
    )


def all_heads(layer: int, heads: int) -> HeadSet:
    """Every head of a layer, with equal weights."""
    return HeadSet((layer,) * heads, tuple(range(heads)), (1.0,) * heads)


@dataclasses.dataclass(frozen=True)
class Recall:
    """How many facts a set of heads keeps within a budget.

    Attributes:
      heads: the head set, measured on documents that it was not learned on.
      keep: budget in tokens, template and question included.
      facts: number of facts asked for.
      kept: number of these facts that are kept whole.
    """

    heads: HeadSet
    keep: int
    facts: int
    kept: int

    @property
    def share(self) -> float:
        """Share of the facts that are kept."""
        return self.kept / self.facts

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the share."""
        return wilson(self.kept, self.facts)


def recall(recorded: Sequence[Recorded], heads: HeadSet, keep: int) -> Recall:
    """Count the facts whose chunks are all among the best whole chunks that fit the budget."""
    facts = kept = 0
    for one in recorded:
        order = np.argsort(-heads.scores(one), kind="stable")
        fits = one.required + np.cumsum(one.sizes[order]) <= keep
        lost = np.ones(len(order), bool)
        lost[order[fits]] = False
        facts += len(one.facts)
        kept += int((~(one.facts & lost).any(axis=1)).sum())
    return Recall(heads, keep, facts, kept)


@dataclasses.dataclass(frozen=True)
class LayerRecall:
    """Recall of a candidate layer on held-out documents, one `Recall` for each budget.

    Attributes:
      learned: with learned weights of the layer's heads.
      alike: with equal weights of the layer's heads.
      up_to: with learned weights of the heads of all layers up to this one.
    """

    layer: int
    learned: tuple[Recall, ...]
    alike: tuple[Recall, ...]
    up_to: tuple[Recall, ...]


def judge(train: Sequence[Recorded], held_out: Sequence[Recorded], layer: int, budgets: Sequence[int]) -> LayerRecall:
    """Learn head weights of a layer, and of all layers up to it, and measure their recall."""
    heads = train[0].scores.shape[1]

    def measured(chosen: HeadSet) -> tuple[Recall, ...]:
        return tuple(recall(held_out, chosen, keep) for keep in budgets)

    return LayerRecall(
        layer=layer,
        learned=measured(learn(train, [layer])),
        alike=measured(all_heads(layer, heads)),
        up_to=measured(learn(train, range(layer + 1))),
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """Settings of a calibration.

    Attributes:
      keep: the budget to choose the layer for; half of it is measured too.
      target: share of facts to keep.
      layers: number of first layers that are candidates.
      tokens: length of the held-out texts. Training texts have a quarter to half of it. The preset's segments have an
        eighth more, for the question.
      train, held_out: number of questions to learn from and to measure on.
      distractors: facts in each text that look like the one in question.
      seed: random seed of the facts, their places and the texts.
      filter_attention, filter_precision: see `GemFilter`.
    """

    keep: int
    target: float
    layers: int
    tokens: int
    train: int
    held_out: int
    distractors: int
    seed: int
    filter_attention: FilterAttention
    filter_precision: FilterPrecision


def calibrate(
    model: Pipeline,
    plan: Plan,
    *,
    paragraphs: Sequence[str] | None = None,
    progress: Callable[[str, int, int], None],
) -> tuple[list[LayerRecall], Preset]:
    """Measure every candidate layer, and make a preset of the earliest that meets the target, or of the best.

    Args:
      paragraphs: text to hide facts in; None for the built-in text of each split.
      progress: called with (stage, done, total).

    Raises:
      UserError: texts are longer than half of the model's context, or too short for their facts.
    """
    method = GemFilter(
        filter_layer=0,
        keep=plan.keep,
        filter_attention=plan.filter_attention,
        filter_precision=plan.filter_precision,
        segment=plan.tokens * 9 // 8,
    )
    config = model.checkpoint.model.config
    if plan.tokens > config.context // 2:
        raise UserError(f"tokens is {plan.tokens}; the model reads {config.context}, at most half of which is tried")

    def recorded(split: hidden_facts.SplitName, count: int, sizes: Sequence[int]) -> list[Recorded]:
        made: list[Recorded] = []
        for index, size in enumerate(sizes[:count]):
            task = hidden_facts.HiddenFacts(
                count=len(range(index, count, len(sizes))),
                split=split,
                distractors=plan.distractors,
                seed=plan.seed + index,
                paragraphs=None if paragraphs is None else tuple(paragraphs),
            )
            for example in task.examples(model.checkpoint.tokenizer, size):
                made.append(record(model, example, method, plan.layers))
                progress(f"reading, {split}", len(made), count)
        return made

    train = recorded("train", plan.train, (plan.tokens // 4, plan.tokens // 3, plan.tokens // 2))
    held_out = recorded("held_out", plan.held_out, (plan.tokens,))
    judged = []
    for layer in range(plan.layers):
        judged.append(judge(train, held_out, layer, (plan.keep // 2, plan.keep)))
        progress("learning", len(judged), plan.layers)
    return judged, _preset(model, plan, method, judged)


def _preset(model: Pipeline, plan: Plan, method: GemFilter, judged: Sequence[LayerRecall]) -> Preset:
    chosen = next((one for one in judged if one.learned[-1].share >= plan.target), None)
    best = chosen or max(judged, key=lambda one: one.learned[-1].share)
    heads = best.learned[-1].heads.of_layer(best.layer, model.checkpoint.model.config.heads)
    kept = best.learned[-1]
    low, high = kept.interval
    verdict = "the earliest that meets" if chosen else "the best of those tried, none of which meets"
    source = (
        f"gemfilter calibrate: layer {best.layer} kept {kept.kept} of {kept.facts} held-out facts "
        f"({kept.share:.0%}, 95 % interval {low:.0%} to {high:.0%}) with {plan.keep} of {plan.tokens} tokens, "
        f"{verdict} the target of {plan.target:.0%}; heads learned on {plan.train} other facts"
    )
    return Preset(
        name=model.preset.name if model.preset.name != "none" else model.checkpoint.name,
        default=dataclasses.replace(method, filter_layer=best.layer, head_weights=heads, share=AUTO_SHARE),
        paper_layer=model.preset.paper_layer,
        source=source,
        recall=tuple(row for one in judged for row in _rows(one)),
    )


def _rows(judged: LayerRecall) -> Iterator[dict[str, Any]]:
    for kind in ("learned", "alike", "up_to"):
        for one in getattr(judged, kind):
            low, high = one.interval
            heads = zip(one.heads.layers, one.heads.heads, one.heads.weights, strict=True)
            yield {
                "layer": judged.layer,
                "kind": kind,
                "heads": [list(head) for head in heads],
                "keep": one.keep,
                "facts": one.facts,
                "kept": one.kept,
                "low": round(low, 3),
                "high": round(high, 3),
            }
