"""Stage 1 on the host: prompts in, kept token indices out; prompts beyond the context in segments and rounds."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemfilter_jax import selection, two_stage
from gemfilter_jax.buckets import bucket
from gemfilter_jax.config import ModelConfig
from gemfilter_jax.errors import UserError
from gemfilter_jax.methods import GemFilter
from gemfilter_jax.models.decoder import Decoder
from gemfilter_jax.prompts import Prompt
from gemfilter_jax.scoring import Normalisation

Progress = Callable[[int, int], None]
"""Told (tokens read, tokens to read) as stage 1 goes on."""

_select = jax.jit(selection.select, static_argnames=("capacity", "pooling", "kernel"))
_SEGMENTS = 4  # within reach: attention costs less in short segments, the template and question more


def keep_tokens(
    model: Decoder, prompts: Sequence[Prompt], method: GemFilter, *, progress: Progress | None = None
) -> list[np.ndarray]:
    """The indices of the tokens that `method` keeps of each prompt, increasing.

    A prompt beyond the model's reach (its context, or the filter layer's sliding window) is first cut into segments of
    a quarter of that, each with the template's head and the question around it; the best tokens of all segments, as
    many as one segment holds (or `keep`, if that is more), then go through the filter together.

    Raises:
      UserError: the method does not fit the model or a prompt.
    """
    for prompt in prompts:
        check(model, prompt, method)
    reach = _reach(model.config, method)
    left = [_left_by_segments(reach, prompt, method) for prompt in prompts]
    waiting = [row for row, tokens in enumerate(left) if tokens > method.keep]
    count = _Counter(
        progress,
        sum(left[row] for row in waiting) + sum(len(prompt) for prompt in prompts if len(prompt) > reach),
    )
    kept = [
        _best_of_segments(model, prompt, method, count) if len(prompt) > reach else np.arange(len(prompt))
        for prompt in prompts
    ]
    if waiting:
        passed = _best_of_whole(model, [prompts[row] for row in waiting], [kept[row] for row in waiting], method)
        for row, rows in zip(waiting, passed, strict=True):
            kept[row] = rows
        count.add(sum(left[row] for row in waiting))
    return kept


class _Counter:
    """Adds up the tokens that were read and passes them on."""

    def __init__(self, progress: Progress | None, total: int):
        self._progress, self._read, self._total = progress, 0, total

    def add(self, tokens: int) -> None:
        self._read += tokens
        if self._progress:
            self._progress(self._read, self._total)


def check(model: Decoder, prompt: Prompt, method: GemFilter) -> None:
    """Raise a `UserError` if `method` cannot serve this model and prompt."""
    config = model.config
    if not 0 <= method.filter_layer < config.layers:
        raise UserError(
            f"filter layer {method.filter_layer} is out of range; the model has layers 0 to {config.layers - 1}"
        )
    if method.filter_layer >= model.held_layers:
        raise UserError(
            f"filter layer {method.filter_layer} is beyond the first {model.held_layers} layers, which alone are loaded"
        )
    for name in ("keep", "window", "kernel", "chunk"):
        if getattr(method, name) < 1:
            raise UserError(f"{name} is {getattr(method, name)}, expected at least 1 token")
    if method.head_weights is not None and len(method.head_weights) != config.heads:
        raise UserError(f"{len(method.head_weights)} head weights were given; the model has {config.heads} query heads")
    required = prompt.head + prompt.tail
    if method.keep_required and method.keep < min(required, len(prompt)):
        raise UserError(
            f"keep is {method.keep}, but the template and the question alone are {required} tokens; keep more than that"
        )
    reach = _reach(config, method)
    if len(prompt) > reach and _document_room(reach, prompt) < method.chunk:
        raise UserError(
            f"the template and the question take {required} tokens, which leaves no room for the document in a "
            f"segment of {reach // _SEGMENTS} tokens; ask a shorter question"
        )
    if len(prompt) > reach and method.positions == "original":
        raise UserError(
            f"original positions need a prompt within the model's context of {reach} tokens, this one has {len(prompt)}"
        )


def _reach(config: ModelConfig, method: GemFilter) -> int:
    """The longest prompt that is filtered in one pass: past a sliding window, probabilities would all be zero."""
    return config.context if method.normalisation == "none" else config.reach(method.filter_layer)


def _document_room(reach: int, prompt: Prompt) -> int:
    """Document tokens in a segment."""
    return reach // _SEGMENTS - prompt.head - prompt.tail


def _left_by_segments(reach: int, prompt: Prompt, method: GemFilter) -> int:
    """Tokens of a prompt before its last pass: all of one within reach, else what its segments leave of it."""
    if len(prompt) <= reach:
        return len(prompt)
    around = prompt.head + prompt.tail
    return min(len(prompt), around + max(_document_room(reach, prompt), method.keep - around))


def _best_of_segments(model: Decoder, prompt: Prompt, method: GemFilter, count: _Counter) -> np.ndarray:
    """The first round of a prompt beyond reach: score every segment, keep what one pass holds."""
    reach = _reach(model.config, method)
    rows = np.arange(len(prompt))
    head, tail = rows[: prompt.head], rows[len(rows) - prompt.tail :]
    normalisation: Normalisation = "sink" if method.normalisation == "softmax" else method.normalisation
    scores = []
    for document in _segments(prompt, method, _document_room(reach, prompt)):
        segment = np.concatenate([head, document, tail])
        scored = _scores(model, [prompt.ids[segment]], method, normalisation, width=bucket(reach // _SEGMENTS))
        scores.append(scored[0, prompt.head : len(segment) - prompt.tail])
        count.add(len(document))
    count.add(len(head) + len(tail))
    padded = np.zeros((1, bucket(len(rows))), np.float32)
    padded[0, prompt.head : len(rows) - prompt.tail] = np.concatenate(scores)
    keep = _left_by_segments(reach, prompt, method)
    return _kept(padded, [prompt], [rows], method, keep=keep, required=True)[0]


def _segments(prompt: Prompt, method: GemFilter, room: int) -> list[np.ndarray]:
    """The document's rows, cut into pieces of up to `room` tokens between chunks."""
    chunks = _chunks(prompt, method)
    start, end, segments = prompt.head, len(prompt) - prompt.tail, []
    while start < end:
        stop = min(start + room, end)
        if stop < end:
            stop = int(np.searchsorted(chunks, chunks[stop]))  # where the chunk that would be cut begins
        segments.append(np.arange(start, stop))
        start = stop
    return segments


def _chunks(prompt: Prompt, method: GemFilter) -> np.ndarray:
    """int [S], the number of each token's chunk; chunks begin anew at the document's first and past its last token."""
    rows = np.arange(len(prompt))
    within = (rows >= prompt.head).astype(int) + (rows >= len(prompt) - prompt.tail)
    pieces = np.stack([within, prompt.sentences if method.sentences else within])
    begins = np.flatnonzero(np.diff(pieces, axis=1, prepend=-1).any(axis=0))
    sizes = np.diff(begins, append=len(prompt))
    parts = -(-sizes // method.chunk)  # a piece longer than a chunk is cut into so many
    lengths = -(-sizes // parts) if method.sentences else np.full_like(sizes, method.chunk)
    piece = np.repeat(np.arange(len(begins)), sizes)
    return np.cumsum(np.append(0, parts))[piece] + (rows - begins[piece]) // lengths[piece]


def _best_of_whole(
    model: Decoder, prompts: Sequence[Prompt], candidates: list[np.ndarray], method: GemFilter
) -> list[np.ndarray]:
    """The last round: every prompt, or what is left of it, in one pass."""
    ids = [prompt.ids[rows] for prompt, rows in zip(prompts, candidates, strict=True)]
    scores = _scores(model, ids, method, method.normalisation, width=bucket(max(map(len, ids))))
    return _kept(scores, prompts, candidates, method, keep=method.keep, required=method.keep_required)


def _scores(
    model: Decoder, ids: list[np.ndarray], method: GemFilter, normalisation: Normalisation, *, width: int
) -> np.ndarray:
    weights = method.head_weights or (1.0,) * model.config.heads
    padded, lengths = pad(ids, width)
    return np.asarray(
        two_stage.score_prompt(
            model,
            padded,
            lengths,
            jnp.int32(method.filter_layer),
            jnp.asarray(weights, jnp.float32),
            window=method.window,
            normalisation=normalisation,
        )
    )


def _kept(
    scores: np.ndarray,
    prompts: Sequence[Prompt],
    candidates: list[np.ndarray],
    method: GemFilter,
    *,
    keep: int,
    required: bool,
) -> list[np.ndarray]:
    """The kept ones of each prompt's candidates, whose scores are [B, S]."""
    always = np.zeros(scores.shape, bool)
    chunks = np.zeros(scores.shape, np.int32)
    for row, (prompt, rows) in enumerate(zip(prompts, candidates, strict=True)):
        always[row, : len(rows)] = prompt.required[rows] & required
        chunks[row, : len(rows)] = _chunks(prompt, method)[rows]
        chunks[row, len(rows) :] = len(prompt)
    kept = _select(
        scores,
        np.array([len(rows) for rows in candidates], np.int32),
        keep=jnp.int32(keep),
        capacity=min(bucket(keep), scores.shape[1]),
        required=always,
        pooling=method.pooling,
        kernel=method.kernel,
        chunks=chunks if method.chunk > 1 else None,
    )
    indices, counts = np.asarray(kept.indices), np.asarray(kept.lengths)
    return [rows[indices[row, : counts[row]]] for row, rows in enumerate(candidates)]


def pad(rows: Sequence[np.ndarray], width: int) -> tuple[jax.Array, jax.Array]:
    """Rows of token ids, padded on the right to int32 [B, width], and their true lengths int32 [B]."""
    padded = np.zeros((len(rows), width), np.int32)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return jnp.asarray(padded), jnp.asarray([len(row) for row in rows], jnp.int32)
