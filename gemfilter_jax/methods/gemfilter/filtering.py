"""Stage 1 on the host: prompts in, kept token indices out; prompts beyond the context in segments and rounds."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemfilter_jax.buckets import bucket
from gemfilter_jax.errors import UserError
from gemfilter_jax.methods.gemfilter import scoring_pass, segments, selection
from gemfilter_jax.methods.gemfilter.documents import Reading
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.methods.gemfilter.scoring_pass import Progress
from gemfilter_jax.models.transformer import Decoder
from gemfilter_jax.parallel import sharding
from gemfilter_jax.text.prompt import Prompt

_select = jax.jit(selection.select, static_argnames=("capacity", "pooling", "kernel"))


def keep_tokens(
    model: Decoder, prompts: Sequence[Prompt], method: GemFilter, *, progress: Progress | None = None
) -> list[np.ndarray]:
    """The indices of the tokens that `method` keeps of each prompt, in the order in which stage 2 reads them.

    A prompt beyond `segments.reach` is cut into segments, each with the template's head and the question around it;
    the best tokens of all segments are kept, at once or in `method.rounds`.

    Raises:
      UserError: the method does not fit the model or a prompt.
    """
    for prompt in prompts:
        check(model, prompt, method)
    kept = [np.arange(len(prompt)) for prompt in prompts]
    limit = segments.reach(model.config, method)
    count = _Counter(progress, sum(_to_read(prompt, method, limit) for prompt in prompts))
    together: dict[bool, list[int]] = {}  # prompts that pass whole, in one batch for each form of attention
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
    model: Decoder, prompt: Prompt, method: GemFilter, reading: Reading, *, progress: Progress | None = None
) -> np.ndarray:
    """As `keep_tokens` of one prompt whose document has been read already.

    Args:
      prompt, method: which have passed `check`.
      reading: which fits them.
    """
    if len(prompt) <= method.keep:
        return np.arange(len(prompt))
    whole = len(prompt) <= segments.reach(model.config, method)
    scores = reading.scores(model, prompt, method)
    if whole:
        return _chosen([scores], [prompt], [np.arange(len(prompt))], method)[0]
    return _in_rounds(model, prompt, method, _Counter(progress, _to_read(prompt, method, 0) - len(prompt)), scores)


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
    check_method(model, method)
    config = model.config
    required = prompt.prefix_length + prompt.suffix_length
    for keep in (*method.rounds, method.keep):
        if method.keep_required and keep < min(required, len(prompt)):
            raise UserError(
                f"keep is {keep}, but the template and the question alone are {required} tokens; keep more than that"
            )
    segments.check_room(config, prompt, method)
    if len(prompt) > config.context and method.positions == "original":
        raise UserError(
            f"original positions need a prompt within the model's context of {config.context} tokens, "
            f"this one has {len(prompt)}"
        )


def check_method(model: Decoder, method: GemFilter) -> None:
    """Raise a `UserError` if `method` cannot serve this model, whatever the prompt."""
    config = model.config
    if not 0 <= method.filter_layer < config.layers:
        raise UserError(
            f"filter layer {method.filter_layer} is out of range; the model has layers 0 to {config.layers - 1}"
        )
    if method.filter_layer >= model.held_layers:
        raise UserError(
            f"filter layer {method.filter_layer} is beyond the first {model.held_layers} layers, which alone are loaded"
        )
    for name in ("keep", "window", "kernel", "chunk", "band", "segment"):
        tokens = getattr(method, name)
        if tokens is not None and tokens < 1:
            raise UserError(f"{name} is {tokens}, expected at least 1 token")
    if method.first_tokens < 0:
        raise UserError(f"first_tokens is {method.first_tokens}, expected at least 0")
    if method.share is not None and not (0 < method.share <= 1 and method.normalisation != "none"):
        raise UserError(
            f"share is {method.share}, expected more than 0 and at most 1, and a rule whose scores are probabilities"
        )
    if method.head_weights is not None and len(method.head_weights) != config.heads:
        raise UserError(f"{len(method.head_weights)} head weights were given; the model has {config.heads} query heads")
    if method.order == "best_last" and method.positions == "original":
        raise UserError("original positions need order 'text'")


def _budgets(prompt: Prompt, method: GemFilter) -> list[int]:
    """Tokens that each round of a prompt beyond reach leaves, falling."""
    budgets = [max(keep, prompt.prefix_length + prompt.suffix_length) for keep in (*method.rounds, method.keep)]
    return [keep for index, keep in enumerate(budgets) if keep < min([len(prompt), *budgets[:index]])]


def _to_read(prompt: Prompt, method: GemFilter, limit: int) -> int:
    """Tokens that pass through the filter, over all rounds."""
    if len(prompt) > limit:
        budgets = _budgets(prompt, method)
        return sum([len(prompt), *budgets[:-1]]) if budgets else 0
    return len(prompt) if len(prompt) > method.keep else 0


def _in_rounds(
    model: Decoder, prompt: Prompt, method: GemFilter, count: _Counter, first: np.ndarray | None = None
) -> np.ndarray:
    """What is kept of a prompt beyond reach; `first` are the scores of its first round, if they are known."""
    rows = np.arange(len(prompt))
    budgets = _budgets(prompt, method)
    for keep in budgets:
        if first is None:
            scores = _scores_in_pieces(model, prompt, rows, method, count)
        else:
            scores, first = first, None
        last = keep == budgets[-1]
        rows = _chosen([scores], [prompt], [rows], method, keep=None if last else keep)[0]
    return rows


def _scores_in_pieces(
    model: Decoder, prompt: Prompt, rows: np.ndarray, method: GemFilter, count: _Counter
) -> np.ndarray:
    """A score for each of some rows of a prompt, read in as many passes as they need; 0 for required ones."""
    scores = np.zeros(len(rows), np.float32)
    head, tail = rows[: prompt.prefix_length], rows[len(rows) - prompt.suffix_length :]
    whole = len(rows) <= segments.reach(model.config, method)
    done = prompt.prefix_length
    parts = segments.pieces(model.config, prompt, rows, method)
    longest = max(map(len, parts))
    width = segments.width(prompt.prefix_length + longest + prompt.suffix_length)
    for group in segments.groups(model.config, method, parts, sharding.shape_of(model.mesh).data):
        ids = [prompt.ids[np.concatenate([head, piece, tail])] for piece in group]
        alike = [prompt] * len(group)
        scored = scoring_pass.scores(model, ids, alike, method, whole=whole, document=longest, width=width)
        for row, piece in zip(scored, group, strict=True):
            scores[done : done + len(piece)] = row[prompt.prefix_length : prompt.prefix_length + len(piece)]
            done += len(piece)
            count.add(len(piece))
    count.add(prompt.prefix_length + prompt.suffix_length)
    return scores


def _best_of_whole(model: Decoder, prompts: Sequence[Prompt], method: GemFilter) -> list[np.ndarray]:
    """What is kept of prompts within reach, all in one pass."""
    ids = [prompt.ids for prompt in prompts]
    document = max(len(prompt) - prompt.prefix_length - prompt.suffix_length for prompt in prompts)
    scores = scoring_pass.scores(
        model, ids, prompts, method, whole=True, document=document, width=bucket(max(map(len, ids)))
    )
    return _chosen(list(scores), prompts, [np.arange(len(prompt)) for prompt in prompts], method)


def _chosen(
    scores: list[np.ndarray],
    prompts: Sequence[Prompt],
    candidates: list[np.ndarray],
    method: GemFilter,
    *,
    keep: int | None = None,
) -> list[np.ndarray]:
    """The kept ones of each prompt's candidates, which have a score each.

    Args:
      keep: so many, increasing, for a further round; None for as many and in such order as the method says.
    """
    width = bucket(max(map(len, candidates)))
    padded = np.zeros((len(prompts), width), np.float32)
    always = np.zeros(padded.shape, bool)
    chunks = np.zeros(padded.shape, np.int32)
    for row, (prompt, rows) in enumerate(zip(prompts, candidates, strict=True)):
        padded[row, : len(rows)] = scores[row][: len(rows)]
        always[row, : len(rows)] = prompt.required[rows] & (method.keep_required or keep is not None)
        chunks[row, : len(rows)] = segments.chunks(prompt, method)[rows]
        chunks[row, len(rows) :] = len(prompt)
    kept = _select(
        padded,
        np.array([len(rows) for rows in candidates], np.int32),
        keep=jnp.int32(keep or method.keep),
        capacity=min(bucket(keep or method.keep), width),
        share=None if keep or method.share is None else jnp.float32(method.share),
        least=jnp.int32(method.least),
        required=always,
        pooling=method.pooling,
        kernel=method.kernel,
        chunks=chunks if method.chunk > 1 else None,
    )
    indices, counts, ranked = jax.device_get((kept.indices, kept.lengths, kept.ranked))
    chosen = []
    for row, (prompt, rows) in enumerate(zip(prompts, candidates, strict=True)):
        best = rows[indices[row, : counts[row]]]
        last = keep is None and method.order == "best_last"
        chosen.append(_best_last(prompt, best, ranked[row, : counts[row]]) if last else best)
    return chosen


def _best_last(prompt: Prompt, rows: np.ndarray, ranked: np.ndarray) -> np.ndarray:
    """Increasing rows of a prompt with the document's passages, runs of neighbours, by their highest rank."""
    head, tail = np.searchsorted(rows, [prompt.prefix_length, len(prompt) - prompt.suffix_length])
    cuts = head + 1 + np.flatnonzero(np.diff(rows[head:tail]) > 1)
    passages = [passage for passage in np.split(np.arange(head, tail), cuts - head) if len(passage)]
    passages.sort(key=lambda passage: ranked[passage].max())
    return rows[np.concatenate([np.arange(head), *passages, np.arange(tail, len(rows))])]
