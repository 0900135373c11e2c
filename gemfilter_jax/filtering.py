"""Stage 1 on the host: prompts in, kept token indices out; prompts beyond the context in segments and rounds."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemfilter_jax import selection, two_stage
from gemfilter_jax.buckets import bucket
from gemfilter_jax.errors import UserError
from gemfilter_jax.methods import GemFilter
from gemfilter_jax.models.decoder import Decoder
from gemfilter_jax.prompts import Prompt
from gemfilter_jax.scoring import Normalisation

Progress = Callable[[int, int], None]
"""Told (tokens read, tokens to read) as stage 1 goes on."""

_select = jax.jit(selection.select, static_argnames=("capacity", "pooling", "kernel", "chunk"))


def keep_tokens(
    model: Decoder, prompts: Sequence[Prompt], method: GemFilter, *, progress: Progress | None = None
) -> list[np.ndarray]:
    """The indices of the tokens that `method` keeps of each prompt, increasing.

    A prompt beyond the model's context is first cut into segments of half the context, each with the template's head
    and the question around it; the best tokens of all segments go through the filter again, until one pass holds them.

    Raises:
      UserError: the method does not fit the model or a prompt.
    """
    for prompt in prompts:
        check(model, prompt, method)
    report = progress or (lambda read, total: None)
    context = model.config.context
    candidates = [np.arange(len(prompt)) for prompt in prompts]
    for row, prompt in enumerate(prompts):
        while len(candidates[row]) > context:
            candidates[row] = _best_of_segments(model, prompt, candidates[row], method, report)
    if any(len(rows) > method.keep for rows in candidates):
        candidates = _best_of_whole(model, prompts, candidates, method, report)
    return candidates


def check(model: Decoder, prompt: Prompt, method: GemFilter) -> None:
    """Raise a `UserError` if `method` cannot serve this model and prompt."""
    config = model.config
    if not 0 <= method.filter_layer < config.layers:
        raise UserError(
            f"filter layer {method.filter_layer} is out of range; the model has layers 0 to {config.layers - 1}"
        )
    if method.keep < 1:
        raise UserError(f"keep is {method.keep}; at least 1 token must be kept")
    if method.head_weights is not None and len(method.head_weights) != config.heads:
        raise UserError(f"{len(method.head_weights)} head weights were given; the model has {config.heads} query heads")
    required = prompt.head + prompt.tail
    if method.keep_required and method.keep < min(required, len(prompt)):
        raise UserError(
            f"keep is {method.keep}, but the template and the question alone are {required} tokens; keep more than that"
        )
    if len(prompt) > config.context and _document_room(config.context, prompt, method) < method.chunk:
        raise UserError(
            f"the template and the question take {required} tokens, which leaves no room for the document in a "
            f"segment of {config.context // 2} tokens; ask a shorter question"
        )
    if len(prompt) > config.context and method.positions == "original":
        raise UserError(
            f"original positions need a prompt within the model's context of {config.context} tokens, "
            f"this one has {len(prompt)}"
        )


def _document_room(context: int, prompt: Prompt, method: GemFilter) -> int:
    """Document tokens in a segment: whole chunks, so that no chunk lies across two segments."""
    room = context // 2 - prompt.head - prompt.tail
    return room // method.chunk * method.chunk


def _best_of_segments(
    model: Decoder, prompt: Prompt, rows: np.ndarray, method: GemFilter, report: Progress
) -> np.ndarray:
    """One round: score every segment, keep as much as one segment holds (or `keep`, if that is more)."""
    context = model.config.context
    room = _document_room(context, prompt, method)
    head, tail = rows[: prompt.head], rows[len(rows) - prompt.tail :]
    document = rows[prompt.head : len(rows) - prompt.tail]
    normalisation: Normalisation = "sink" if method.normalisation == "softmax" else method.normalisation
    scores = []
    for start in range(0, len(document), room):
        segment = np.concatenate([head, document[start : start + room], tail])
        scored = _scores(model, [prompt.ids[segment]], method, normalisation, width=bucket(context // 2))
        scores.append(scored[0, prompt.head : len(segment) - prompt.tail])
        report(min(start + room, len(document)), len(document))
    width = bucket(len(rows))
    padded = np.zeros((1, width), np.float32)
    padded[0, prompt.head : len(rows) - prompt.tail] = np.concatenate(scores)
    kept_document = max(room, (method.keep - prompt.head - prompt.tail) // method.chunk * method.chunk)
    kept_document = min(kept_document, (context - prompt.head - prompt.tail) // method.chunk * method.chunk)
    keep = kept_document + prompt.head + prompt.tail
    return rows[_kept(padded, [prompt], [len(rows)], method, keep=keep, required=True)[0]]


def _best_of_whole(
    model: Decoder, prompts: Sequence[Prompt], candidates: list[np.ndarray], method: GemFilter, report: Progress
) -> list[np.ndarray]:
    """The last round: every prompt, or what is left of it, in one pass."""
    ids = [prompt.ids[rows] for prompt, rows in zip(prompts, candidates, strict=True)]
    scores = _scores(model, ids, method, method.normalisation, width=bucket(max(map(len, ids))))
    total = sum(map(len, ids))
    report(total, total)
    kept = _kept(scores, prompts, [len(row) for row in ids], method, keep=method.keep, required=method.keep_required)
    return [rows[indices] for rows, indices in zip(candidates, kept, strict=True)]


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
    lengths: list[int],
    method: GemFilter,
    *,
    keep: int,
    required: bool,
) -> list[np.ndarray]:
    """Indices into each row of scores [B, S]. What is left of a prompt still begins and ends with its head and tail."""
    columns = np.arange(scores.shape[1])
    heads = np.array([prompt.head for prompt in prompts], np.int32)
    tails = np.array([prompt.tail for prompt in prompts], np.int32)
    ends = np.array(lengths, np.int32)
    outside = (columns < heads[:, None]) | (columns >= (ends - tails)[:, None])
    kept = _select(
        scores,
        ends,
        keep=jnp.int32(keep),
        capacity=min(bucket(keep), scores.shape[1]),
        required=jnp.asarray(outside & required),
        pooling=method.pooling,
        kernel=method.kernel,
        chunk=method.chunk,
        chunk_start=heads,
    )
    return [row[:count] for row, count in zip(np.asarray(kept.indices), np.asarray(kept.lengths), strict=True)]


def pad(rows: Sequence[np.ndarray], width: int) -> tuple[jax.Array, jax.Array]:
    """Rows of token ids, padded on the right to int32 [B, width], and their true lengths int32 [B]."""
    padded = np.zeros((len(rows), width), np.int32)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return jnp.asarray(padded), jnp.asarray([len(row) for row in rows], jnp.int32)
