"""Calibration: finds the layer and the heads of a model that pick passages with answers, and makes a preset of them.

Each document passes once through the candidate layers, and the score of each passage by each head is recorded. Weights
of the heads are then learned with optax on some documents and measured on others, beside the words that passage and
question share, as the filter will rank them.

Axes: N documents, L layers, H heads, P passages.
"""

import collections
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import optimize

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals.example import Example
from gemfilter_jax.evals.summary import wilson
from gemfilter_jax.evals.task import WHOLE
from gemfilter_jax.evals.tasks.hidden_facts import HiddenFacts, SplitName
from gemfilter_jax.evals.tasks.no_literal_match import NoLiteralMatch
from gemfilter_jax.evals.tasks.real_questions import RealQuestions
from gemfilter_jax.generate import loop
from gemfilter_jax.methods import lexical, passages
from gemfilter_jax.methods.gemfilter import fusion, scoring_pass, segments
from gemfilter_jax.methods.gemfilter.method import (
    AUTO_RECALL,
    FilterAttention,
    FilterPrecision,
    GemFilter,
    Head,
    log_odds,
)
from gemfilter_jax.methods.presets import Preset
from gemfilter_jax.parallel import collectives, sharding
from gemfilter_jax.pipeline import Pipeline
from gemfilter_jax.text.prompt import Prompt, encode

_STEPS = 300
_LEARNING_RATE = 0.1
_SPARSITY = 0.02  # weight of the sparsity penalty in the loss; it drives heads that add nothing to 0
_SMALLEST_SHARE = 0.1  # heads with a smaller share of the weights are dropped
_SHARPNESSES = tuple(round(0.05 * 1.1**step, 3) for step in range(60))  # up to 14
_LONG = 4  # times the usual length: some texts, so that passages of different segments are compared
_PENALTY = 0.5  # of the regression of recall, in questions
_LEAST_SLOPE = 0.05
_MASKED = -1e9  # finite, so that gradients stay finite


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What is recorded of one document with a question.

    Attributes:
      kind: the kind of question.
      scores: float32 [L, H, P], each head's mean score of each passage's tokens.
      words: float32 [P], see `lexical.scores`.
      sizes: int [P], tokens in each passage.
      answers: bool [F, P], the passages that hold each of the F facts in question.
      either: whether one of the facts is enough.
      required: number of prefix and suffix tokens, which are always kept.
    """

    kind: str
    scores: np.ndarray
    words: np.ndarray
    sizes: np.ndarray
    answers: np.ndarray
    either: bool
    required: int


def record(model: Pipeline, example: Example, method: GemFilter, layers: int) -> Recorded:
    """Record the scores of every head of the first `layers` layers in an example.

    Args:
      method: sets the observation window, passages, segments, attention and precision.
    """
    prompt = encode(
        model.checkpoint.tokenizer,
        example.text,
        example.question,
        observation_rows=method.observation_rows,
        chat_template=model.chat_template,
        message_format=model.message_format,
    )
    segments.check_room(model.checkpoint.model.config, prompt, method)
    rows = np.arange(len(prompt))
    listed = passages.listed(prompt, passages.PassageRule.of(method), rows)
    scores = np.concatenate(
        [_scores(model, prompt, piece, method, layers) for piece in _pieces(model, prompt, method)], 2
    )
    starts, ends = (
        prompt.offsets[listed.tokens[place], side] for side, place in enumerate((listed.first, listed.last))
    )
    verbatim = getattr(example, "occurrences", ())
    return Recorded(
        kind=example.group,
        scores=fusion.mean_scores(scores, listed.first),
        words=lexical.scores(listed.texts, prompt.question),
        sizes=listed.sizes,
        answers=np.stack([_holders(starts, ends, span) for span in verbatim or example.spans]),
        either=bool(verbatim),
        required=prompt.prefix_length + prompt.suffix_length,
    )


def _pieces(model: Pipeline, prompt: Prompt, method: GemFilter) -> list[np.ndarray]:
    return segments.pieces(model.checkpoint.model.config, prompt, np.arange(len(prompt)), method)


def _scores(model: Pipeline, prompt: Prompt, piece: np.ndarray, method: GemFilter, layers: int) -> np.ndarray:
    """float32 [L, H, n], of the n tokens of a piece of the document."""
    decoder = model.checkpoint.model
    whole = np.concatenate(
        [np.arange(prompt.prefix_length), piece, np.arange(len(prompt) - prompt.suffix_length, len(prompt))]
    )
    padded = sharding.evenly([prompt.ids[whole]], sharding.shape_of(decoder.mesh).rows)
    ids, lengths = loop.pad(padded, segments.width(len(whole)))
    suffix_lengths = np.full(len(padded), prompt.suffix_length, np.int32)
    scoring = scoring_pass.ScoringPass.of(
        method, decoder.config.heads, document=len(piece), suffix_lengths=suffix_lengths, whole=False
    )
    made = scoring_pass.score_heads(decoder, ids, lengths, jnp.asarray(suffix_lengths), scoring, layers=layers)
    return collectives.to_host(made)[:, 0, :, prompt.prefix_length : prompt.prefix_length + len(piece)]


def _holders(starts: np.ndarray, ends: np.ndarray, span: tuple[int, int]) -> np.ndarray:
    """bool [P], passages that hold more than 1 - `WHOLE` of a fact, so that the fact is not kept without them."""
    overlap = np.maximum(np.minimum(ends, span[1]) - np.maximum(starts, span[0]), 0)
    return overlap > (1 - WHOLE) * (span[1] - span[0])


@dataclasses.dataclass(frozen=True)
class Ranking:
    """A way to rank passages, as `fusion.ranking` does.

    Attributes:
      layer: the filter layer.
      heads: those that count; empty for all heads of the layer alike.
      lexical: see `GemFilter`.
    """

    layer: int
    heads: tuple[Head, ...]
    lexical: float

    def ranks(self, recorded: Recorded) -> np.ndarray:
        """float32 [P], the higher the better."""
        if self.heads:
            scores = np.stack([recorded.scores[one.layer, one.head] for one in self.heads])
        else:
            scores = recorded.scores[self.layer].sum(axis=0, keepdims=True)
        said = np.average(fusion.said(scores), axis=0, weights=[one.weight for one in self.heads] or None)
        return said + self.lexical * recorded.words


def learn(recorded: Sequence[Recorded], layers: int, words: float) -> tuple[Head, ...]:
    """Learn weights of the heads of the first `layers` layers that rank the passages with answers first.

    The loss is the cross-entropy of softmax(t s), s the passages' ranks and t a learned sharpness, against the passages
    with answers, plus a small sparsity penalty on heads. Every kind of question has the same weight.

    Args:
      words: weight of the words, see `Ranking.lexical`.

    Returns:
      The heads that matter, the strongest of weight 1.
    """
    longest = max(len(one.sizes) for one in recorded)
    heads = recorded[0].scores.shape[1]
    said = np.zeros((len(recorded), layers * heads, longest), np.float32)
    shared = np.full((len(recorded), longest), _MASKED, np.float32)
    wanted = np.zeros((len(recorded), longest), bool)
    for row, one in enumerate(recorded):
        size = len(one.sizes)
        said[row, :, :size] = fusion.said(one.scores[:layers].reshape(layers * heads, size))
        shared[row, :size] = words * one.words
        wanted[row, :size] = one.answers.any(axis=0)
    arrays = tuple(map(jnp.asarray, (said, shared, wanted, _weights(recorded))))
    parameters = {"heads": jnp.zeros(layers * heads), "sharpness": jnp.zeros(())}
    learned = _minimised(parameters, *arrays)
    shares = np.asarray(jax.nn.softmax(learned["heads"]))
    used = np.flatnonzero(shares >= min(_SMALLEST_SHARE, shares.max()))
    strengths = [round(float(one), 2) for one in shares[used] / shares.max()]
    return tuple(Head(int(i) // heads, int(i) % heads, one) for i, one in zip(used, strengths, strict=True))


def _weights(recorded: Sequence[Recorded]) -> np.ndarray:
    """float32 [N], of sum 1: the same for each kind of question."""
    kinds = collections.Counter(one.kind for one in recorded)
    return np.array([1 / kinds[one.kind] / len(kinds) for one in recorded], np.float32)


def sharpest(recorded: Sequence[Recorded], ranking: Ranking) -> float:
    """The sharpness t of the highest likelihood, see `learn`, for a ranking as it is."""

    def likelihood(sharpness: float) -> float:
        total = 0.0
        for one, weight in zip(recorded, _weights(recorded), strict=True):
            evidence = sharpness * (ranking.ranks(one) - ranking.ranks(one).max())
            share = np.exp(evidence[one.answers.any(axis=0)]).sum() / np.exp(evidence).sum()
            total += weight * np.log(max(share, np.finfo(np.float32).tiny))
        return total

    return float(max(_SHARPNESSES, key=likelihood))


@jax.jit
def _minimised(
    parameters: dict[str, jax.Array], said: jax.Array, shared: jax.Array, wanted: jax.Array, weights: jax.Array
) -> dict[str, jax.Array]:
    def loss(parameters: dict[str, jax.Array]) -> jax.Array:
        shares = jax.nn.softmax(parameters["heads"])
        ranks = jnp.einsum("k,nkp->np", shares, said) + shared
        likely = jax.nn.log_softmax(jnp.exp(parameters["sharpness"]) * ranks, axis=-1)
        of_answers = jax.nn.logsumexp(jnp.where(wanted, likely, _MASKED), axis=-1)
        return -(weights * of_answers).sum() + _SPARSITY * jnp.sqrt(shares).sum()

    optimiser = optax.adam(_LEARNING_RATE)

    def step(_, carry):
        parameters, state = carry
        updates, state = optimiser.update(jax.grad(loss)(parameters), state)
        return optax.apply_updates(parameters, updates), state

    return jax.lax.fori_loop(0, _STEPS, step, (parameters, optimiser.init(parameters)))[0]


@dataclasses.dataclass(frozen=True)
class Recall:
    """How often a ranking keeps the answers within a budget.

    Attributes:
      ranking: the ranking, measured on documents that it was not learned on.
      keep: budget in tokens, template and question included.
      kept: (answers kept whole, answers asked for) of each kind of question.
    """

    ranking: Ranking
    keep: int
    kept: Mapping[str, tuple[int, int]]

    @property
    def balanced(self) -> float:
        """What layers are compared by: the share that is kept, mean over the kinds, the worst of which counts twice."""
        shares = [kept / asked for kept, asked in self.kept.values()]
        return (sum(shares) + min(shares)) / (len(shares) + 1)

    @property
    def counts(self) -> tuple[int, int]:
        """(kept, asked for), whatever the kind."""
        kept, asked = zip(*self.kept.values(), strict=True)
        return sum(kept), sum(asked)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the share of all answers that are kept."""
        return wilson(*self.counts)


def _kept(recorded: Recorded, ranks: np.ndarray, keep: int) -> np.ndarray:
    """bool [P], the best whole passages that fit the budget."""
    order = np.argsort(-ranks, kind="stable")
    kept = np.zeros(len(order), bool)
    kept[order[recorded.required + np.cumsum(recorded.sizes[order]) <= keep]] = True
    return kept


def recall(recorded: Sequence[Recorded], ranking: Ranking, keep: int) -> Recall:
    """Count the answers whose passages are all kept."""
    counts: dict[str, tuple[int, int]] = {}
    for one in recorded:
        held = (_kept(one, ranking.ranks(one), keep) | ~one.answers).all(axis=1)
        kept, asked = counts.get(one.kind, (0, 0))
        more = (int(held.any()), 1) if one.either else (int(held.sum()), len(held))
        counts[one.kind] = kept + more[0], asked + more[1]
    return Recall(ranking, keep, counts)


def recall_fit(recorded: Sequence[Recorded], ranking: Ranking, sharpness: float, keep: int) -> tuple[float, ...]:
    """What `GemFilter.recall_fit` is: fitted to what is kept with half of a budget, with all, and with twice of it.

    A penalty keeps the weights near those of shares that are probabilities.
    """
    shares, kept, weights = [], [], []
    for one, weight in zip(recorded, _weights(recorded), strict=True):
        ranks = ranking.ranks(one)
        likely = np.exp(sharpness * (ranks - ranks.max()))
        for budget in (keep // 2, keep, keep * 2):
            fits = _kept(one, ranks, budget)
            held = (fits | ~one.answers).all(axis=1)
            shares.append((1.0, log_odds(float(likely[fits].sum() / likely.sum())), np.log(len(ranks))))
            kept.append(held.any() if one.either else held.mean())
            weights.append(weight)
    x, y, w = np.array(shares), np.array(kept, np.float64), np.array(weights, np.float64) * len(recorded)
    as_they_are = np.array([0.0, 1.0, 0.0])  # weights for shares that are probabilities

    def loss(fit: np.ndarray) -> tuple[float, np.ndarray]:
        log_odds_of_recall, off = x @ fit, fit - as_they_are
        unlikely = w @ (np.logaddexp(0, log_odds_of_recall) - y * log_odds_of_recall)
        slope = x.T @ (w * (1 / (1 + np.exp(-log_odds_of_recall)) - y))
        return float(unlikely + _PENALTY / 2 * off @ off), slope + _PENALTY * off

    fit = optimize.minimize(loss, as_they_are, jac=True).x
    fit[1] = max(fit[1], _LEAST_SLOPE)
    return tuple(round(float(one), 3) for one in fit)


@dataclasses.dataclass(frozen=True)
class LayerRecall:
    """Recall of a candidate layer on held-out documents, one `Recall` for each budget.

    Attributes:
      learned: with learned weights of the heads of all layers up to this one.
      alike: with all heads of this layer alike.
      attention: as `learned`, without the words.
      sharpness: of the learned ranking, see `sharpest`.
    """

    layer: int
    learned: tuple[Recall, ...]
    alike: tuple[Recall, ...]
    attention: tuple[Recall, ...]
    sharpness: float


def judge(
    train: Sequence[Recorded], held_out: Sequence[Recorded], layer: int, budgets: Sequence[int], words: float
) -> LayerRecall:
    """Learn weights of the heads up to a layer, and measure their recall."""

    def measured(ranking: Ranking) -> tuple[Recall, ...]:
        return tuple(recall(held_out, ranking, keep) for keep in budgets)

    heads = learn(train, layer + 1, words)
    return LayerRecall(
        layer=layer,
        learned=measured(Ranking(layer, heads, words)),
        alike=measured(Ranking(layer, (), words)),
        attention=measured(Ranking(layer, heads, 0.0)),
        sharpness=sharpest(train, Ranking(layer, heads, words)),
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """Settings of a calibration.

    Attributes:
      keep: the budget to choose the layer for; half of it is measured too.
      target: share of the best layer's recall that the chosen layer, the earliest such, must have.
      layers: number of first layers that are candidates.
      tokens: length of held-out texts, and the longest of training texts, which begin at half of it; but one in six
        is four times as long and read in segments. The preset's segments have an eighth more, for the question.
      train, held_out: number of questions of each built-in kind to learn from and to measure on.
      distractors: facts in each text that look like the one in question.
      seed: random seed of the facts, their places and the texts.
      questions: file of real questions, see `RealQuestions`; the verbatim ones of one half of its documents to learn
        from, of the other half to measure on; None for the built-in kinds alone.
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
    questions: str | None = None


def calibrate(
    model: Pipeline,
    plan: Plan,
    *,
    paragraphs: Sequence[str] | None = None,
    progress: Callable[[str, int, int], None],
) -> tuple[list[LayerRecall], Preset]:
    """Measure every candidate layer, and make a preset of the earliest that is about as good as the best.

    Args:
      paragraphs: text to hide facts in; None for the built-in text of each split.
      progress: called with (stage, done, total).

    Raises:
      UserError: texts are longer than half of the model's context or too short for their facts, or the questions
        cannot be read.
    """
    method = GemFilter(
        filter_layer=0,
        keep=plan.keep,
        normalisation="sink",
        band=model.preset.default.band,
        filter_attention=plan.filter_attention,
        filter_precision=plan.filter_precision,
        segment=plan.tokens * 9 // 8,
    )
    config = model.checkpoint.model.config
    if plan.tokens > config.context // 2:
        raise UserError(f"tokens is {plan.tokens}; the model reads {config.context}, at most half of which is tried")

    def recorded(split: SplitName) -> list[Recorded]:
        examples = list(_examples(model, plan, split, paragraphs))
        made: list[Recorded] = []
        for kind, example in examples:
            made.append(dataclasses.replace(record(model, example, method, plan.layers), kind=kind))
            progress(f"reading, {split}", len(made), len(examples))
        return made

    train, held_out = recorded("train"), recorded("held_out")
    judged = []
    for layer in range(plan.layers):
        judged.append(judge(train, held_out, layer, (plan.keep // 2, plan.keep), method.lexical))
        progress("learning", len(judged), plan.layers)
    return judged, _preset(model, plan, method, judged, len(train), held_out)


def _examples(
    model: Pipeline, plan: Plan, split: SplitName, paragraphs: Sequence[str] | None
) -> Iterator[tuple[str, Example]]:
    """Questions of a split and their kinds."""
    training = split == "train"
    short = (plan.tokens // 2, plan.tokens * 3 // 4, plan.tokens) if training else (plan.tokens,) * 3
    sizes = (*short, *short[:2], plan.tokens * _LONG)
    count = plan.train if training else plan.held_out
    tokenizer = model.checkpoint.tokenizer
    for index, size in enumerate(sizes[:count]):
        own = len(range(index, count, len(sizes)))
        hidden = HiddenFacts(
            count=own,
            split=split,
            distractors=plan.distractors,
            seed=plan.seed + index,
            paragraphs=None if paragraphs is None else tuple(paragraphs),
        )
        unlike = NoLiteralMatch(count=own, split=split, seed=plan.seed + index)
        for task in (hidden, unlike):
            for example in task.examples(tokenizer, size):
                yield task.name, example
    if plan.questions is not None:
        real = RealQuestions(questions_file=plan.questions, only="verbatim", seed=plan.seed)
        documents = sorted({example.text for example in real.examples(tokenizer, 0)})
        if len(documents) < 2:
            raise UserError(f"{plan.questions}: one document has verbatim answers, expected two or more")
        half = set(random.Random(plan.seed).sample(documents, len(documents) // 2))
        for example in real.examples(tokenizer, 0):
            if (example.text in half) == training:
                yield real.name, example


def _preset(
    model: Pipeline,
    plan: Plan,
    method: GemFilter,
    judged: Sequence[LayerRecall],
    learned_on: int,
    held_out: Sequence[Recorded],
) -> Preset:
    most = max(one.learned[-1].balanced for one in judged)
    best = next(one for one in judged if one.learned[-1].balanced >= plan.target * most)
    kept, asked = best.learned[-1].counts
    low, high = best.learned[-1].interval
    kinds = ", ".join(f"{name} {kept} of {asked}" for name, (kept, asked) in best.learned[-1].kept.items())
    ranking = best.learned[-1].ranking
    source = (
        f"gemfilter calibrate: heads up to layer {best.layer} kept {kept} of {asked} held-out answers "
        f"({kept / asked:.0%}, 95 % interval {low:.0%} to {high:.0%}; {kinds}) with {plan.keep} tokens of texts of "
        f"{plan.tokens} to {plan.tokens * _LONG}, the earliest layer with {plan.target:.0%} of the best one's recall; "
        f"heads learned on {learned_on} other questions"
    )
    return Preset(
        name=model.preset.name if model.preset.name != "none" else model.checkpoint.name,
        default=dataclasses.replace(
            method,
            filter_layer=best.layer,
            heads=tuple(map(str, ranking.heads)),
            sharpness=best.sharpness,
            recall_fit=recall_fit(held_out, ranking, best.sharpness, plan.keep),
            recall=AUTO_RECALL,
        ),
        paper_layer=model.preset.paper_layer,
        source=source,
        recall=tuple(row for one in judged for row in _rows(one)),
    )


def _rows(judged: LayerRecall) -> Iterator[dict[str, Any]]:
    for kind in ("learned", "alike", "attention"):
        for one in getattr(judged, kind):
            heads = [str(head) for head in one.ranking.heads]
            yield {
                "layer": judged.layer,
                "kind": kind,
                "heads": heads,
                "keep": one.keep,
                "kept": {kind: list(counts) for kind, counts in one.kept.items()},
            }
