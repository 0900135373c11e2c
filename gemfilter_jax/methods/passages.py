"""Passages: the chunks of a prompt, and which of them are kept by their scores."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemfilter_jax.buckets import bucket
from gemfilter_jax.methods import selection
from gemfilter_jax.methods.base import Method, Order, Pooling
from gemfilter_jax.text.prompt import Prompt

_select = jax.jit(selection.select, static_argnames=("capacity", "pooling", "pool_size"))


@dataclasses.dataclass(frozen=True)
class PassageRule:
    """How scores become passages. The fields are the options of `GemFilter` that have these names."""

    keep: int
    chunk: int
    sentences: bool
    order: Order
    share: float | None = None
    least: int = 1
    keep_required: bool = True
    pooling: Pooling = "none"
    pool_size: int = 1

    @classmethod
    def of(cls, method: Method) -> "PassageRule":
        """The rule of a method that has these options, or some of them."""
        names = {field.name for field in dataclasses.fields(cls)} & {one.name for one in method.options()}
        return cls(**{name: getattr(method, name) for name in names})


def chunks(prompt: Prompt, rule: PassageRule) -> np.ndarray:
    """int [S], chunk index of each token; new chunks begin at the document's first token and after its last one."""
    rows = np.arange(len(prompt))
    within = (rows >= prompt.prefix_length).astype(int) + (rows >= len(prompt) - prompt.suffix_length)
    parts = np.stack([within, prompt.passages if rule.sentences else within])
    begins = np.flatnonzero(np.diff(parts, axis=1, prepend=-1).any(axis=0))
    sizes = np.diff(begins, append=len(prompt))
    counts = -(-sizes // rule.chunk)  # chunks that each part is cut into
    lengths = -(-sizes // counts) if rule.sentences else np.full_like(sizes, rule.chunk)
    part = np.repeat(np.arange(len(begins)), sizes)
    return np.cumsum(np.append(0, counts))[part] + (rows - begins[part]) // lengths[part]


@dataclasses.dataclass(frozen=True)
class Listed:
    """The P passages of a prompt's document, among some of its tokens.

    Attributes:
      tokens: int [n], the places among those tokens of the ones in passages, increasing.
      first: int [P], the place among `tokens` at which each passage begins.
      numbers: int [P], increasing: the number of each passage in the prompt, see `chunks`.
      texts: the passages.
    """

    tokens: np.ndarray
    first: np.ndarray
    numbers: np.ndarray
    texts: list[str]

    @property
    def last(self) -> np.ndarray:
        """int [P], the place among `tokens` of each passage's last one."""
        return np.append(self.first[1:], len(self.tokens)) - 1

    @property
    def sizes(self) -> np.ndarray:
        """int [P], tokens in each passage."""
        return np.diff(self.first, append=len(self.tokens))

    def for_each_token(self, of_passages: np.ndarray, count: int, *, others: float = 0.0) -> np.ndarray:
        """float32 [count]: every token has its passage's value, and tokens outside of passages `others`."""
        spread = np.full(count, others, np.float32)
        spread[self.tokens] = np.repeat(of_passages, self.sizes)
        return spread


def once(ranks: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Ranks [P], -inf for the text of one that ranks higher or, else, comes first; case and white space aside."""
    seen = {""}
    repeated = np.zeros(len(ranks), bool)
    for index in np.argsort(-ranks, kind="stable"):
        text = " ".join(texts[int(index)].lower().split())
        repeated[index] = text in seen and text != ""
        seen.add(text)
    return np.where(repeated, np.float32(-np.inf), ranks)


def listed(prompt: Prompt, rule: PassageRule, rows: np.ndarray) -> Listed:
    """The passages among increasing token indices."""
    tokens = np.flatnonzero(~prompt.required[rows])
    document = rows[tokens]
    numbers = chunks(prompt, rule)[document]
    first = np.flatnonzero(np.diff(numbers, prepend=-1))
    starts, ends = (
        prompt.offsets[document[first], 0],
        prompt.offsets[np.append(document[first[1:] - 1], document[-1:]), 1],
    )
    texts = [prompt.text[start:end] for start, end in zip(starts, ends, strict=True)]
    return Listed(tokens, first, numbers[first], texts)


def kept(
    scores: list[np.ndarray],
    prompts: Sequence[Prompt],
    candidates: list[np.ndarray],
    rule: PassageRule,
    *,
    keep: int | None = None,
    masses: list[np.ndarray] | None = None,
    shares: list[float] | None = None,
) -> list[np.ndarray]:
    """The kept tokens among each prompt's candidates; `scores` has a score for each candidate.

    Args:
      masses: what shares are of, for each candidate; None for the scores.
      shares: one for each prompt; None for the rule's share.
      keep: number of tokens to keep for a further round, in prompt order; None for the rule's budget and order.
    """
    width = bucket(max(map(len, candidates)))
    padded, weighed = np.zeros((2, len(prompts), width), np.float32)
    always = np.zeros(padded.shape, bool)
    numbers = np.zeros(padded.shape, np.int32)
    for row, (prompt, rows) in enumerate(zip(prompts, candidates, strict=True)):
        padded[row, : len(rows)] = scores[row][: len(rows)]
        weighed[row, : len(rows)] = (scores if masses is None else masses)[row][: len(rows)]
        always[row, : len(rows)] = prompt.required[rows] & (rule.keep_required or keep is not None)
        numbers[row, : len(rows)] = chunks(prompt, rule)[rows]
        numbers[row, len(rows) :] = len(prompt)
    if shares is None and rule.share is not None:
        shares = [rule.share] * len(prompts)
    selected = _select(
        padded,
        np.array([len(rows) for rows in candidates], np.int32),
        keep=jnp.int32(keep or rule.keep),
        capacity=min(bucket(keep or rule.keep), width),
        share=None if keep or shares is None else np.asarray(shares, np.float32)[:, None],
        least=jnp.int32(rule.least),
        masses=weighed,
        required=always,
        pooling=rule.pooling,
        pool_size=rule.pool_size,
        chunks=numbers if rule.chunk > 1 else None,
    )
    indices, counts, ranked = jax.device_get((selected.indices, selected.lengths, selected.ranked))
    chosen = []
    for row, (prompt, rows) in enumerate(zip(prompts, candidates, strict=True)):
        best = rows[indices[row, : counts[row]]]
        last = keep is None and rule.order == "best_last"
        chosen.append(_best_last(prompt, best, ranked[row, : counts[row]]) if last else best)
    return chosen


def _best_last(prompt: Prompt, rows: np.ndarray, ranked: np.ndarray) -> np.ndarray:
    """Sort the document's passages (runs of adjacent rows) by their highest `ranked` value, the best passage last."""
    start, stop = np.searchsorted(rows, [prompt.prefix_length, len(prompt) - prompt.suffix_length])
    cuts = 1 + np.flatnonzero(np.diff(rows[start:stop]) > 1)
    passages = [passage for passage in np.split(np.arange(start, stop), cuts) if len(passage)]
    passages.sort(key=lambda passage: ranked[passage].max())
    return rows[np.concatenate([np.arange(start), *passages, np.arange(stop, len(rows))])]
