"""From the scores of heads, and the words shared with the question, to one score for each passage."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gemfilter_jax.methods import lexical, passages
from gemfilter_jax.methods.passages import PassageRule
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
        ranks = ranking(of_heads[:, listed.tokens], listed.first, listed.texts, prompt.question, method)
        likely = np.exp(method.sharpness * (ranks - ranks.max()))
        values.append(listed.for_each_token(ranks, len(rows)))
        masses.append(listed.for_each_token(likely / listed.sizes, len(rows)))
    return passages.kept(
        values, prompts, candidates, dataclasses.replace(rule, pooling="none"), keep=keep, masses=masses
    )


def ranking(
    scores: np.ndarray, first: np.ndarray, texts: Sequence[str], question: str, method: "GemFilter"
) -> np.ndarray:
    """float32 [P]: the heads' weighted mean of what each says of a passage, plus `lexical` times the words' score.

    What a head says is `said` of its score of the passage's best token, whatever the scale of the head.

    Args:
      scores: float32 [N, n], of the n tokens of all passages.
      first: int [P], where in `scores` each passage begins. texts: the P passages.
    """
    weights = [head.weight for head in method.chosen_heads] or None
    attention = np.average(said(np.maximum.reduceat(scores, first, axis=1)), axis=0, weights=weights)
    if not method.lexical:
        return attention.astype(np.float32)
    return (attention + method.lexical * lexical.scores(texts, question)).astype(np.float32)


def said(best: np.ndarray) -> np.ndarray:
    """[N, P]: the logarithm of each head's scores [N, P], in standard deviations from the mean over the P passages."""
    faintest = np.maximum(best.max(axis=1, keepdims=True) * _FAINTEST, np.finfo(np.float32).tiny)
    logarithms = np.log(np.maximum(best, faintest))
    deviations = logarithms.std(axis=1, keepdims=True)
    return (logarithms - logarithms.mean(axis=1, keepdims=True)) / np.where(deviations == 0, 1, deviations)
