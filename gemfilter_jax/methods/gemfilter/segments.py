"""Cuts a prompt into segments, which pass through the filter separately."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from gemfilter_jax.buckets import bucket
from gemfilter_jax.config import ModelConfig
from gemfilter_jax.errors import UserError
from gemfilter_jax.methods import passages
from gemfilter_jax.methods.passages import PassageRule
from gemfilter_jax.text.prompt import Prompt

if TYPE_CHECKING:
    from gemfilter_jax.methods.gemfilter.method import GemFilter

_Part = TypeVar("_Part")

_SEGMENT = 9 / 16  # of the context: a prompt as long as the context makes two segments, each with the question
_TOGETHER = 4  # most segments in one pass, with about as many tokens as the context; faster than one by one
_WIDTH_STEP = 512  # finer than buckets, which would pad a segment by up to half of its length
_QUESTION_STEPS = 32  # the room for the question grows in steps of the reach divided by this


def reach(config: ModelConfig, method: "GemFilter") -> int:
    """The longest prompt that is filtered in one pass, and the longest segment of a longer prompt.

    Attention probabilities beyond a sliding window would all be zero.
    """
    if method.normalisation == "none":
        return config.context
    return min(*map(config.reach, method.looks_at), method.segment or int(_SEGMENT * config.context))


def check_room(config: ModelConfig, prompt: Prompt, method: "GemFilter") -> None:
    """Raise a `UserError` if a prompt longer than the reach leaves no room for its document in a segment."""
    if len(prompt) > reach(config, method) and _room(config, prompt, method) < method.chunk:
        around, longest = prompt.prefix_length + prompt.suffix_length, reach(config, method)
        raise UserError(
            f"the template and the question take {around} tokens, which leaves no room for a chunk of {method.chunk} "
            f"tokens of the document in a segment of {longest} tokens; ask a shorter question"
        )


def _room(config: ModelConfig, prompt: Prompt, method: "GemFilter") -> int:
    """Number of document tokens that fit in a segment; questions of similar length leave the same room."""
    step = max(reach(config, method) // _QUESTION_STEPS, 1)
    return reach(config, method) - prompt.prefix_length - -(-prompt.suffix_length // step) * step


def pieces(config: ModelConfig, prompt: Prompt, rows: np.ndarray, method: "GemFilter") -> list[np.ndarray]:
    """Cut the document tokens among `rows` between chunks, one piece for each segment; one piece if within reach.

    Args:
      rows: increasing token indices, including all required tokens.
    """
    document = rows[prompt.prefix_length : len(rows) - prompt.suffix_length]
    if len(rows) <= reach(config, method):
        return [document]
    room = _room(config, prompt, method)
    numbers = passages.chunks(prompt, PassageRule.of(method))[document]
    start, cut = 0, []
    while start < len(document):
        left = len(document) - start
        stop = start + -(-left // -(-left // room))  # so that no piece is much shorter than the others
        if stop < len(document):
            begin, end = (int(np.searchsorted(numbers, numbers[stop], side)) for side in ("left", "right"))
            stop = begin if begin > start else end  # a chunk is never cut, and always fits the room
        cut.append(document[start:stop])
        start = stop
    return cut


def width(longest: int) -> int:
    """The padded length of segments of at most `longest` tokens."""
    return min(bucket(longest), -(-longest // _WIDTH_STEP) * _WIDTH_STEP)


def groups(config: ModelConfig, method: "GemFilter", parts: Sequence[_Part], at_once: int = 1) -> list[Sequence[_Part]]:
    """Group segments, or items that belong to them, by pass: full groups, then the rest in groups of `at_once`.

    Args:
      at_once: number of shards of a batch on a mesh.
    """
    size = -(-min(_TOGETHER, -(-config.context // reach(config, method))) // at_once) * at_once
    together = len(parts) // size * size
    starts = [*range(0, together, size), *range(together, len(parts), at_once), len(parts)]
    return [parts[start:stop] for start, stop in itertools.pairwise(starts)]
