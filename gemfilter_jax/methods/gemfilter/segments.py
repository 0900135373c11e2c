"""How a prompt is cut: the chunks that are kept together, and the segments that pass through the filter one by one."""

import itertools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from gemfilter_jax.buckets import bucket
from gemfilter_jax.config import ModelConfig
from gemfilter_jax.errors import UserError
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.text.prompt import Prompt

_Part = TypeVar("_Part")

_SEGMENT = 9 / 16  # of the context: a prompt as long as that is cut in two, its question in both
_TOGETHER = 4  # segments in one pass at most: about as many tokens as the context, faster than one by one
_WIDTH_STEP = 512  # a bucket would add up to half of a segment's length
_QUESTION_STEPS = 32  # room for the question grows by this fraction of the reach


def reach(config: ModelConfig, method: GemFilter) -> int:
    """The longest prompt that is filtered in one pass, and the longest segment of a longer one.

    Past a sliding window probabilities would all be zero.
    """
    if method.normalisation == "none":
        return config.context
    return min(config.reach(method.filter_layer), method.segment or int(_SEGMENT * config.context))


def check_room(config: ModelConfig, prompt: Prompt, method: GemFilter) -> None:
    """Raise a `UserError` if a prompt beyond the reach has no room for its document in a segment."""
    if len(prompt) > reach(config, method) and _room(config, prompt, method) < method.chunk:
        raise UserError(
            f"the template and the question take {prompt.prefix_length + prompt.suffix_length} tokens, which leaves "
            f"no room for the document in a segment of {reach(config, method)} tokens; ask a shorter question"
        )


def _room(config: ModelConfig, prompt: Prompt, method: GemFilter) -> int:
    """Document tokens in a segment; questions of about the same length leave the same room."""
    step = max(reach(config, method) // _QUESTION_STEPS, 1)
    return reach(config, method) - prompt.prefix_length - -(-prompt.suffix_length // step) * step


def pieces(config: ModelConfig, prompt: Prompt, rows: np.ndarray, method: GemFilter) -> list[np.ndarray]:
    """The document's part of some rows of a prompt, cut between chunks into what one pass reads: whole if in reach.

    Args:
      rows: increasing indices of tokens, all required ones among them.
    """
    document = rows[prompt.prefix_length : len(rows) - prompt.suffix_length]
    if len(rows) <= reach(config, method):
        return [document]
    room = _room(config, prompt, method)
    numbers = chunks(prompt, method)[document]
    start, cut = 0, []
    while start < len(document):
        left = len(document) - start
        stop = start + -(-left // -(-left // room))  # so that none is much shorter than the others
        if stop < len(document):
            begin, end = (int(np.searchsorted(numbers, numbers[stop], side)) for side in ("left", "right"))
            stop = begin if begin > start else end  # a chunk is never cut, and always fits the room
        cut.append(document[start:stop])
        start = stop
    return cut


def width(longest: int) -> int:
    """What segments of at most so many tokens are padded to."""
    return min(bucket(longest), -(-longest // _WIDTH_STEP) * _WIDTH_STEP)


def groups(config: ModelConfig, method: GemFilter, parts: Sequence[_Part], at_once: int = 1) -> list[Sequence[_Part]]:
    """Segments, or what belongs to each, as they pass through the filter: several at a time, the rest `at_once`.

    Args:
      at_once: rows that a batch on a mesh is cut into.
    """
    size = -(-min(_TOGETHER, -(-config.context // reach(config, method))) // at_once) * at_once
    together = len(parts) // size * size
    starts = [*range(0, together, size), *range(together, len(parts), at_once), len(parts)]
    return [parts[start:stop] for start, stop in itertools.pairwise(starts)]


def chunks(prompt: Prompt, method: GemFilter) -> np.ndarray:
    """int [S], the number of each token's chunk; chunks begin anew at the document's first and past its last token."""
    rows = np.arange(len(prompt))
    within = (rows >= prompt.prefix_length).astype(int) + (rows >= len(prompt) - prompt.suffix_length)
    parts = np.stack([within, prompt.sentences if method.sentences else within])
    begins = np.flatnonzero(np.diff(parts, axis=1, prepend=-1).any(axis=0))
    sizes = np.diff(begins, append=len(prompt))
    counts = -(-sizes // method.chunk)  # a part longer than a chunk is cut into so many
    lengths = -(-sizes // counts) if method.sentences else np.full_like(sizes, method.chunk)
    part = np.repeat(np.arange(len(begins)), sizes)
    return np.cumsum(np.append(0, counts))[part] + (rows - begins[part]) // lengths[part]
