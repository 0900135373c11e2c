"""What each head says of each passage of a document, and which passages hold the answers."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from gemfilter_jax.evals.example import Example
from gemfilter_jax.evals.task import WHOLE
from gemfilter_jax.generate import loop
from gemfilter_jax.methods import lexical, passages
from gemfilter_jax.methods.gemfilter import fusion, scoring_pass, segments
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.parallel import collectives, sharding
from gemfilter_jax.pipeline import Pipeline
from gemfilter_jax.text.prompt import Prompt, encode


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What is recorded of one document with a question.

    Attributes:
      kind: the kind of question.
      scores: float32 [L, H, P], each head's mean score of each passage's tokens.
      texts: the passages.
      words: float32 [P], see `lexical.scores`.
      sizes: int [P], tokens in each passage.
      answers: bool [F, P], the passages that hold each of the F facts in question.
      either: whether one of the facts is enough.
      required: number of prefix and suffix tokens, which are always kept.
    """

    kind: str
    scores: np.ndarray
    texts: Sequence[str]
    words: np.ndarray
    sizes: np.ndarray
    answers: np.ndarray
    either: bool
    required: int

    def kept(self, ranks: np.ndarray, keep: int) -> np.ndarray:
        """bool [P], the best whole passages by `ranks` that fit a budget of `keep` tokens."""
        order = np.argsort(-ranks, kind="stable")
        kept = np.zeros(len(order), bool)
        kept[order[self.required + np.cumsum(self.sizes[order]) <= keep]] = True
        return kept

    def answered(self, kept: np.ndarray) -> tuple[int, int]:
        """(answers held whole by the kept passages, answers asked for)."""
        held = (kept | ~self.answers).all(axis=1)
        return (int(held.any()), 1) if self.either else (int(held.sum()), len(held))


def record(model: Pipeline, example: Example, method: GemFilter, layers: int) -> Recorded:
    """Record the scores of every head of the first `layers` layers in an example.

    Args:
      method: sets the observation window, passages, segments, attention and precision.
    """
    prompt = encode(
        model.checkpoint.tokenizer,
        example.text,
        example.question,
        observation_rows=method.observation_rows,
        chat_template=model.chat_template,
        message_format=model.message_format,
    )
    segments.check_room(model.checkpoint.model.config, prompt, method)
    rows = np.arange(len(prompt))
    listed = passages.listed(prompt, passages.PassageRule.of(method), rows)
    scores = np.concatenate(
        [_scores(model, prompt, piece, method, layers) for piece in _pieces(model, prompt, method)], 2
    )
    starts, ends = (
        prompt.offsets[listed.tokens[place], side] for side, place in enumerate((listed.first, listed.last))
    )
    verbatim = getattr(example, "occurrences", ())
    return Recorded(
        kind=example.group,
        scores=fusion.mean_scores(scores, listed.first),
        texts=listed.texts,
        words=lexical.scores(listed.texts, prompt.question),
        sizes=listed.sizes,
        answers=np.stack([_holders(starts, ends, span) for span in verbatim or example.spans]),
        either=bool(verbatim),
        required=prompt.prefix_length + prompt.suffix_length,
    )


def _pieces(model: Pipeline, prompt: Prompt, method: GemFilter) -> list[np.ndarray]:
    return segments.pieces(model.checkpoint.model.config, prompt, np.arange(len(prompt)), method)


def _scores(model: Pipeline, prompt: Prompt, piece: np.ndarray, method: GemFilter, layers: int) -> np.ndarray:
    """float32 [L, H, n], of the n tokens of a piece of the document."""
    decoder = model.checkpoint.model
    whole = np.concatenate(
        [np.arange(prompt.prefix_length), piece, np.arange(len(prompt) - prompt.suffix_length, len(prompt))]
    )
    padded = sharding.evenly([prompt.ids[whole]], sharding.shape_of(decoder.mesh).rows)
    ids, lengths = loop.pad(padded, segments.width(len(whole)))
    suffix_lengths = np.full(len(padded), prompt.suffix_length, np.int32)
    scoring = scoring_pass.ScoringPass.of(
        method, decoder.config.heads, document=len(piece), suffix_lengths=suffix_lengths, whole=False
    )
    made = scoring_pass.score_heads(decoder, ids, lengths, jnp.asarray(suffix_lengths), scoring, layers=layers)
    return collectives.to_host(made)[:, 0, :, prompt.prefix_length : prompt.prefix_length + len(piece)]


def _holders(starts: np.ndarray, ends: np.ndarray, span: tuple[int, int]) -> np.ndarray:
    """bool [P], passages that hold more than 1 - `WHOLE` of a fact, so that the fact is not kept without them.

    Of a fact in so many passages that none of them does, all that hold some of it.
    """
    overlap = np.maximum(np.minimum(ends, span[1]) - np.maximum(starts, span[0]), 0)
    needed = overlap > (1 - WHOLE) * (span[1] - span[0])
    return needed if needed.any() else overlap > 0
