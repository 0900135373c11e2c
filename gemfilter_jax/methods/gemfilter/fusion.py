"""From the scores of heads, and the words shared with the question, to one score for each passage."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gemfilter_jax.methods import lexical, passages
from gemfilter_jax.methods.passages import Listed, PassageRule
from gemfilter_jax.text.prompt import Prompt

if TYPE_CHECKING:
    from gemfilter_jax.methods.gemfilter.method import GemFilter

_FAINTEST = 1e-9  # of the highest score of a head; bounds what a passage that a head does not look at can lose


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is kept of some tokens of a prompt.

    Attributes:
      rows: the kept tokens, see `passages.kept`.
      share: the share of the evidence that they hold: of softmax(sharpness * ranking) over passages. 1 where passages
        are not ranked as wholes.
      passages: number of passages that were ranked.
    """

    rows: np.ndarray
    share: float = 1.0
    passages: int = 0


def kept(
    scores: Sequence[np.ndarray],
    prompts: Sequence[Prompt],
    candidates: list[np.ndarray],
    method: "GemFilter",
    *,
    keep: int | None = None,
) -> list[Choice]:
    """What is kept of each prompt's candidates; arguments as in `passages.kept`.

    Args:
      scores: float32 [N, n or more] for each prompt with n candidates, of each by N heads or mixtures of heads.
    """
    rule = PassageRule.of(method)
    if not method.ranks_passages:
        return list(map(Choice, passages.kept([one[0] for one in scores], prompts, candidates, rule, keep=keep)))
    values, masses, counts = [], [], []
    for of_heads, prompt, rows in zip(scores, prompts, candidates, strict=True):
        listed = passages.listed(prompt, rule, rows)
        own = ranking(of_heads[:, listed.tokens], listed.first, words(prompt, rule, listed, method), method)
        ranks = passages.once(carried(own, listed.numbers, method.carry), listed.texts)
        likely = np.exp(method.sharpness * (ranks - ranks.max(initial=0)))
        values.append(listed.for_each_token(ranks, len(rows), others=-np.inf))
        masses.append(listed.for_each_token(likely / (listed.sizes * likely.sum()), len(rows)))
        counts.append(len(ranks))
    shares = None if method.recall is None else [method.share_for(method.recall, count) for count in counts]
    of_passages = dataclasses.replace(rule, pooling="none")
    kept = passages.kept(values, prompts, candidates, of_passages, keep=keep, masses=masses, shares=shares)
    return [
        Choice(rows, float(mass[np.isin(known, rows)].sum()), count)
        for rows, known, mass, count in zip(kept, candidates, masses, counts, strict=True)
    ]


def words(prompt: Prompt, rule: PassageRule, listed: Listed, method: "GemFilter") -> np.ndarray:
    """float32 [P], `lexical` times the words' score of passages, as it is among all passages of the document."""
    if not method.lexical:
        return np.zeros(len(listed.numbers), np.float32)
    whole = passages.listed(prompt, rule, np.arange(len(prompt)))
    scores = lexical.scores(whole.texts, prompt.question)
    return np.float32(method.lexical) * scores[np.searchsorted(whole.numbers, listed.numbers)]


def ranking(scores: np.ndarray, first: np.ndarray, of_words: np.ndarray, method: "GemFilter") -> np.ndarray:
    """float32 [P]: the heads' weighted mean of what each says of a passage, plus what words add.

    What a head says is `said` of its `mean_scores`, whatever the scale of the head.

    Args:
      scores: float32 [N, n], of the n tokens of all passages.
      first: int [P], where in `scores` each passage begins. of_words: float32 [P], see `words`.
    """
    if not len(first):
        return np.zeros(0, np.float32)
    weights = [head.weight for head in method.chosen_heads] or None
    attention = np.average(said(mean_scores(scores, first)), axis=0, weights=weights)
    return (attention + of_words).astype(np.float32)


def carried(ranks: np.ndarray, numbers: np.ndarray, part: float) -> np.ndarray:
    """[..., P], ranks [..., P] and a part of those of the passage before, where that is among them; numbers: [P]."""
    before = np.roll(ranks, 1, axis=-1) * (np.diff(numbers, prepend=-2) == 1)
    return ranks + np.float32(part) * before


def mean_scores(scores: np.ndarray, first: np.ndarray) -> np.ndarray:
    """[..., P], the mean of scores [..., n] over the tokens of each passage, the first of which are at `first` [P]."""
    return np.add.reduceat(scores, first, axis=-1) / np.diff(first, append=scores.shape[-1])


def said(scores: np.ndarray) -> np.ndarray:
    """[N, P]: the logarithm of each head's scores [N, P], in standard deviations from the mean over the P passages."""
    scores = np.nan_to_num(scores, nan=0.0)
    faintest = np.maximum(scores.max(axis=1, keepdims=True) * _FAINTEST, np.finfo(np.float32).tiny)
    logarithms = np.log(np.maximum(scores, faintest))
    deviations = logarithms.std(axis=1, keepdims=True)
    return (logarithms - logarithms.mean(axis=1, keepdims=True)) / np.where(deviations == 0, 1, deviations)
