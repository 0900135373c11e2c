"""Weights of heads that rank passages with answers first, and how often a ranking keeps the answers."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import optimize

from gemfilter_jax.evals.calibration.recording import Recorded
from gemfilter_jax.evals.summary import wilson
from gemfilter_jax.methods import passages
from gemfilter_jax.methods.gemfilter import fusion
from gemfilter_jax.methods.gemfilter.method import Head, log_odds

_STEPS = 300
_LEARNING_RATE = 0.1
_SPARSITY = 0.02  # weight of the sparsity penalty in the loss; it drives heads that add nothing to 0
_SMALLEST_SHARE = 0.1  # heads with a smaller share of the weights are dropped
_SHARPNESSES = tuple(round(0.05 * 1.1**step, 3) for step in range(60))  # up to 14
_PENALTY = 0.5  # of the regression of recall, in questions
_LEAST_SLOPE = 0.05
_MASKED = -1e9  # finite, so that gradients stay finite


@dataclasses.dataclass(frozen=True)
class Ranking:
    """A way to rank passages, as `fusion.ranking` does.

    Attributes:
      layer: the filter layer.
      heads: those that count; empty for all heads of the layer alike.
      lexical, carry: see `GemFilter`.
    """

    layer: int
    heads: tuple[Head, ...]
    lexical: float
    carry: float

    def ranks(self, recorded: Recorded) -> np.ndarray:
        """float [P], the higher the better; -inf for repeated passages."""
        if self.heads:
            scores = np.stack([recorded.scores[one.layer, one.head] for one in self.heads])
        else:
            scores = recorded.scores[self.layer].sum(axis=0, keepdims=True)
        said = np.average(fusion.said(scores), axis=0, weights=[one.weight for one in self.heads] or None)
        ranks = fusion.carried(said + self.lexical * recorded.words, np.arange(len(said)), self.carry)
        return passages.once(ranks, recorded.texts)


def learn(recorded: Sequence[Recorded], layers: int, lexical: float, carry: float) -> tuple[Head, ...]:
    """Learn weights of the heads of the first `layers` layers that rank the passages with answers first.

    The loss is the cross-entropy of softmax(t s), s the passages' ranks and t a learned sharpness, against the passages
    with answers, plus a small sparsity penalty on heads. Every kind of question has the same weight. Repeated passages
    count as often as they stand there.

    Args:
      lexical, carry: see `Ranking`.

    Returns:
      The heads that matter, the strongest of weight 1.
    """
    heads = recorded[0].scores.shape[1]

    def carried(ranks: np.ndarray) -> np.ndarray:
        return fusion.carried(ranks, np.arange(ranks.shape[-1]), carry)

    said = [carried(fusion.said(one.scores[:layers].reshape(layers * heads, -1))) for one in recorded]
    shared = [carried(lexical * one.words) for one in recorded]
    wanted = [one.answers.any(axis=0) for one in recorded]
    documents = np.repeat(np.arange(len(recorded)), [len(one.sizes) for one in recorded])
    arrays = (np.concatenate(one, axis=-1) for one in (said, shared, wanted))
    parameters = {"heads": jnp.zeros(layers * heads), "sharpness": jnp.zeros(())}
    learned = _minimised(parameters, *arrays, documents, _weights(recorded))
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

    ranks = [ranking.ranks(one) for one in recorded]

    def likelihood(sharpness: float) -> float:
        total = 0.0
        for one, of_one, weight in zip(recorded, ranks, _weights(recorded), strict=True):
            likely = np.exp(sharpness * (of_one - of_one.max()))
            share = likely[one.answers.any(axis=0)].sum() / likely.sum()
            total += weight * np.log(max(share, np.finfo(np.float32).tiny))
        return total

    return float(max(_SHARPNESSES, key=likelihood))


@jax.jit
def _minimised(
    parameters: dict[str, jax.Array],
    said: jax.Array,
    shared: jax.Array,
    wanted: jax.Array,
    documents: jax.Array,
    weights: jax.Array,
) -> dict[str, jax.Array]:
    """The parameters with the least loss, see `learn`.

    Args:
      said: [L * H, P], of the passages of all documents. shared, wanted: [P]. documents: int [P], increasing.
      weights: [N], of documents.
    """

    def of_documents(logarithms: jax.Array) -> jax.Array:
        """[N], the logarithm of the sum over each document's passages."""
        highest = jax.lax.stop_gradient(jax.ops.segment_max(logarithms, documents, len(weights)))
        shifted = jnp.exp(logarithms - highest[documents])
        return highest + jnp.log(jax.ops.segment_sum(shifted, documents, len(weights)))

    def loss(parameters: dict[str, jax.Array]) -> jax.Array:
        shares = jax.nn.softmax(parameters["heads"])
        evidence = jnp.exp(parameters["sharpness"]) * (shares @ said + shared)
        likely = of_documents(jnp.where(wanted, evidence, _MASKED)) - of_documents(evidence)
        return -(weights * likely).sum() + _SPARSITY * jnp.sqrt(shares).sum()

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


def recall(recorded: Sequence[Recorded], ranking: Ranking, keep: int) -> Recall:
    """Count the answers whose passages are all kept."""
    counts: dict[str, tuple[int, int]] = {}
    for one in recorded:
        kept, asked = one.answered(one.kept(ranking.ranks(one), keep))
        before = counts.get(one.kind, (0, 0))
        counts[one.kind] = before[0] + kept, before[1] + asked
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
            fits = one.kept(ranks, budget)
            held, asked = one.answered(fits)
            shares.append((1.0, log_odds(float(likely[fits].sum() / likely.sum())), np.log(len(ranks))))
            kept.append(held / asked)
            weights.append(weight)
    x, y, w = np.array(shares), np.array(kept, np.float64), np.array(weights, np.float64) * len(recorded)
    as_they_are = np.array([0.0, 1.0, 0.0])  # weights for shares that are probabilities

    def loss(fit: np.ndarray) -> tuple[float, np.ndarray]:
        log_odds_of_recall, off = x @ fit, fit - as_they_are
        unlikely = w @ (np.logaddexp(0, log_odds_of_recall) - y * log_odds_of_recall)
        slope = x.T @ (w * (1 / (1 + np.exp(-log_odds_of_recall)) - y))
        return float(unlikely + _PENALTY / 2 * off @ off), slope + _PENALTY * off

    bounds = [(None, None), (_LEAST_SLOPE, None), (None, None)]
    fit = optimize.minimize(loss, as_they_are, jac=True, bounds=bounds).x
    return tuple(round(float(one), 3) for one in fit)
