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


def kept(
    scores: Sequence[np.ndarray],
    prompts: Sequence[Prompt],
    candidates: list[np.ndarray],
    method: "GemFilter",
    *,
    keep: int | None = None,
) -> list[np.ndarray]:
    """The kept tokens among each prompt's candidates; see `passages.kept`.

    Args:
      scores: float32 [N, n or more] for each prompt with n candidates, of each by N heads or mixtures of heads.
    """
    rule = PassageRule.of(method)
    if not method.ranks_passages:
        return passages.kept([one[0] for one in scores], prompts, candidates, rule, keep=keep)
    values, masses = [], []
    for of_heads, prompt, rows in zip(scores, prompts, candidates, strict=True):
        listed = passages.listed(prompt, rule, rows)
        ranks = ranking(of_heads[:, listed.tokens], listed.first, words(prompt, rule, listed, method), method)
        likely = np.exp(method.sharpness * (ranks - ranks.max(initial=0)))
        values.append(listed.for_each_token(ranks, len(rows), others=-np.inf))
        masses.append(listed.for_each_token(likely / listed.sizes, len(rows)))
    of_passages = dataclasses.replace(rule, pooling="none")
    return passages.kept(values, prompts, candidates, of_passages, keep=keep, masses=masses)


def words(prompt: Prompt, rule: PassageRule, listed: Listed, method: "GemFilter") -> np.ndarray:
    """float32 [P], `lexical` times the words' score of passages, as it is among all passages of the document."""
    if not method.lexical:
        return np.zeros(len(listed.numbers), np.float32)
    whole = passages.listed(prompt, rule, np.arange(len(prompt)))
    scores = lexical.scores(whole.texts, prompt.question)
    return np.float32(method.lexical) * scores[np.searchsorted(whole.numbers, listed.numbers)]


def ranking(scores: np.ndarray, first: np.ndarray, of_words: np.ndarray, method: "GemFilter") -> np.ndarray:
    """float32 [P]: the heads' weighted mean of what each says of a passage, plus what words add.

    What a head says is `said` of its score of the passage's best token, whatever the scale of the head.

    Args:
      scores: float32 [N, n], of the n tokens of all passages.
      first: int [P], where in `scores` each passage begins. of_words: float32 [P], see `words`.
    """
    if not len(first):
        return np.zeros(0, np.float32)
    weights = [head.weight for head in method.chosen_heads] or None
    attention = np.average(said(np.maximum.reduceat(scores, first, axis=1)), axis=0, weights=weights)
    return (attention + of_words).astype(np.float32)


def said(best: np.ndarray) -> np.ndarray:
    """[N, P]: the logarithm of each head's scores [N, P], in standard deviations from the mean over the P passages."""
    best = np.nan_to_num(best, nan=0.0)
    faintest = np.maximum(best.max(axis=1, keepdims=True) * _FAINTEST, np.finfo(np.float32).tiny)
    logarithms = np.log(np.maximum(best, faintest))
    deviations = logarithms.std(axis=1, keepdims=True)
    return (logarithms - logarithms.mean(axis=1, keepdims=True)) / np.where(deviations == 0, 1, deviations)
