"""Stage 1 on the host: from prompts to indices of kept tokens. Long prompts are read in segments and rounds."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gemfilter_jax.buckets import bucket
from gemfilter_jax.methods.base import Kept, Progress
from gemfilter_jax.methods.gemfilter import fusion, scoring_pass, segments
from gemfilter_jax.methods.gemfilter.fusion import Choice
from gemfilter_jax.models.transformer import Decoder
from gemfilter_jax.parallel import sharding
from gemfilter_jax.text.prompt import Prompt

if TYPE_CHECKING:
    from gemfilter_jax.methods.gemfilter.documents import Reading
    from gemfilter_jax.methods.gemfilter.method import GemFilter


def keep_tokens(
    model: Decoder, prompts: Sequence[Prompt], method: "GemFilter", *, progress: Progress | None = None
) -> list[Kept]:
    """What `method` keeps of each prompt.

    A prompt longer than `segments.reach` is cut into segments, each with the prompt's prefix and suffix. The best
    tokens of all segments are kept, in one round or in `method.rounds`.

    Raises:
      UserError: the method does not fit the model or a prompt.
    """
    for prompt in prompts:
        method.check_prompt(model, prompt)
    kept = [Kept.everything(prompt) for prompt in prompts]
    limit = segments.reach(model.config, method)
    count = _Counter(progress, sum(_to_read(prompt, method, limit) for prompt in prompts))
    together: dict[bool, list[int]] = {}  # prompts within reach, one batch for each form of attention
    for index, prompt in enumerate(prompts):
        if len(prompt) > limit:
            kept[index] = _in_rounds(model, prompt, method, count)
        elif len(prompt) > method.keep:
            together.setdefault(
                scoring_pass.is_tri_shape(method, len(prompt) - prompt.prefix_length - prompt.suffix_length), []
            ).append(index)
    for indices in together.values():
        own = [prompts[index] for index in indices]
        for index, best in zip(indices, _best_of_whole(model, own, method), strict=True):
            kept[index] = best
        count.add(sum(map(len, own)))
    return kept


def keep_tokens_of_document(
    model: Decoder, prompt: Prompt, method: "GemFilter", reading: "Reading", *, progress: Progress | None = None
) -> Kept:
    """`keep_tokens` for one prompt whose document has already been read.

    Args:
      prompt, method: must have passed `GemFilter.check_prompt`.
      reading: must fit the prompt and the method.
    """
    if len(prompt) <= method.keep:
        return Kept.everything(prompt)
    whole = len(prompt) <= segments.reach(model.config, method)
    scores = reading.scores(model, prompt, method)
    if whole:
        return _told(fusion.kept([scores], [prompt], [np.arange(len(prompt))], method), method)
    return _in_rounds(model, prompt, method, _Counter(progress, _to_read(prompt, method, 0) - len(prompt)), scores)


class _Counter:
    """Counts the tokens read and reports progress."""

    def __init__(self, progress: Progress | None, total: int):
        self._progress, self._read, self._total = progress, 0, total

    def add(self, tokens: int) -> None:
        self._read += tokens
        if self._progress:
            self._progress(self._read, self._total)


def _budgets(prompt: Prompt, method: "GemFilter") -> list[int]:
    """Number of tokens left after each round of a prompt beyond reach, in decreasing order."""
    budgets = [max(keep, prompt.prefix_length + prompt.suffix_length) for keep in (*method.rounds, method.keep)]
    return [keep for index, keep in enumerate(budgets) if keep < min([len(prompt), *budgets[:index]])]


def _to_read(prompt: Prompt, method: "GemFilter", limit: int) -> int:
    """Number of tokens that pass through the filter in all rounds."""
    if len(prompt) > limit:
        budgets = _budgets(prompt, method)
        return sum([len(prompt), *budgets[:-1]]) if budgets else 0
    return len(prompt) if len(prompt) > method.keep else 0


def _in_rounds(
    model: Decoder, prompt: Prompt, method: "GemFilter", count: _Counter, first: np.ndarray | None = None
) -> Kept:
    """What is kept of a prompt beyond reach; `first` holds the scores of the first round if they are known."""
    rows, choices = np.arange(len(prompt)), []
    budgets = _budgets(prompt, method)
    for keep in budgets:
        if first is None:
            scores = _scores_in_pieces(model, prompt, rows, method, count)
        else:
            scores, first = first, None
        last = keep == budgets[-1]
        choices += fusion.kept([scores], [prompt], [rows], method, keep=None if last else keep)
        rows = choices[-1].rows
    return _told(choices, method) if choices else Kept.everything(prompt)


def _told(rounds: Sequence[Choice], method: "GemFilter") -> Kept:
    """What is kept of a prompt in the last of some rounds; its share is of what the rounds before have kept."""
    share = math.prod(one.share for one in rounds)
    return Kept(rounds[-1].rows, method.recall_of(share, rounds[0].passages))


def _scores_in_pieces(
    model: Decoder, prompt: Prompt, rows: np.ndarray, method: "GemFilter", count: _Counter
) -> np.ndarray:
    """float32 [N, n], of each of n rows, read in as many passes as they need; 0 for required tokens."""
    scores = np.zeros((max(len(method.chosen_heads), 1), len(rows)), np.float32)
    prefix, suffix = rows[: prompt.prefix_length], rows[len(rows) - prompt.suffix_length :]
    whole = len(rows) <= segments.reach(model.config, method)
    done = prompt.prefix_length
    parts = segments.pieces(model.config, prompt, rows, method)
    longest = max(map(len, parts))
    width = segments.width(prompt.prefix_length + longest + prompt.suffix_length)
    for group in segments.groups(model.config, method, parts, sharding.shape_of(model.mesh).data):
        ids = [prompt.ids[np.concatenate([prefix, piece, suffix])] for piece in group]
        alike = [prompt] * len(group)
        scored = scoring_pass.scores(model, ids, alike, method, whole=whole, document=longest, width=width)
        for row, piece in zip(scored, group, strict=True):
            scores[:, done : done + len(piece)] = row[:, prompt.prefix_length : prompt.prefix_length + len(piece)]
            done += len(piece)
            count.add(len(piece))
    count.add(prompt.prefix_length + prompt.suffix_length)
    return scores


def _best_of_whole(model: Decoder, prompts: Sequence[Prompt], method: "GemFilter") -> list[Kept]:
    """What is kept of prompts within reach, scored in one pass."""
    ids = [prompt.ids for prompt in prompts]
    document = max(len(prompt) - prompt.prefix_length - prompt.suffix_length for prompt in prompts)
    scores = scoring_pass.scores(
        model, ids, prompts, method, whole=True, document=document, width=bucket(max(map(len, ids)))
    )
    kept = fusion.kept(list(scores), prompts, [np.arange(len(prompt)) for prompt in prompts], method)
    return [_told([one], method) for one in kept]
