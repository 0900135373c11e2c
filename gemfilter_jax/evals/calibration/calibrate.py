"""Measure the first layers of a model as filter layers, and make a preset of the earliest that is about the best."""

import collections
import dataclasses
import importlib.resources
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals.calibration.learning import Ranking, Recall, learn, recall, recall_fit, sharpest
from gemfilter_jax.evals.calibration.recording import Recorded, record
from gemfilter_jax.evals.example import Example
from gemfilter_jax.evals.tasks.hidden_facts import HiddenFacts, SplitName
from gemfilter_jax.evals.tasks.no_literal_match import NoLiteralMatch
from gemfilter_jax.evals.tasks.real_questions import RealQuestions
from gemfilter_jax.methods.gemfilter.method import AUTO_RECALL, FilterAttention, FilterPrecision, GemFilter
from gemfilter_jax.methods.presets import Preset
from gemfilter_jax.pipeline import Pipeline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONG = 4  # some texts are so many times as long, or so many documents, so that passages of several segments compete


@dataclasses.dataclass(frozen=True)
class LayerRecall:
    """Recall of a candidate layer on held-out documents, one `Recall` for each budget.

    Attributes:
      learned: with learned weights of the heads of all layers up to this one.
      alike: with all heads of this layer alike.
      attention: as `learned`, without the words.
      sharpness: of the learned ranking, see `sharpest`.
    """

    layer: int
    learned: tuple[Recall, ...]
    alike: tuple[Recall, ...]
    attention: tuple[Recall, ...]
    sharpness: float


def judge(
    train: Sequence[Recorded], held_out: Sequence[Recorded], layer: int, budgets: Sequence[int], method: GemFilter
) -> LayerRecall:
    """Learn weights of the heads up to a layer, and measure their recall."""

    def measured(ranking: Ranking) -> tuple[Recall, ...]:
        return tuple(recall(held_out, ranking, keep) for keep in budgets)

    heads = learn(train, layer + 1, method.lexical, method.carry)
    learned = Ranking(layer, heads, method.lexical, method.carry)
    return LayerRecall(
        layer=layer,
        learned=measured(learned),
        alike=measured(dataclasses.replace(learned, heads=())),
        attention=measured(dataclasses.replace(learned, lexical=0.0)),
        sharpness=sharpest(train, learned),
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """Settings of a calibration.

    Attributes:
      keep: the budget to choose the layer for; half of it is measured too.
      target: share of the best layer's recall that the chosen layer, the earliest such, must have.
      layers: number of first layers that are candidates.
      tokens: length of held-out texts, and the longest of training texts, which begin at half of it; but one in six
        is four times as long and read in segments. The preset's segments have an eighth more, for the question.
      train, held_out: number of questions of each built-in kind to learn from and to measure on; there are 48 about
        documents in each split.
      distractors: facts in each text that look like the one in question.
      seed: random seed of the facts, their places and the texts.
      questions: file of real questions, see `RealQuestions`; the verbatim ones of one half of its documents to learn
        from, of the other half to measure on; None for the built-in kinds alone.
      filter_attention, filter_precision: see `GemFilter`.
    """

    keep: int
    target: float
    layers: int
    tokens: int
    train: int
    held_out: int
    distractors: int
    seed: int
    filter_attention: FilterAttention
    filter_precision: FilterPrecision
    questions: str | None = None


def calibrate(
    model: Pipeline,
    plan: Plan,
    *,
    paragraphs: Sequence[str] | None = None,
    progress: Callable[[str, int, int], None],
) -> tuple[list[LayerRecall], Preset]:
    """Measure every candidate layer, and make a preset of the earliest that is about as good as the best.

    Args:
      paragraphs: text to hide facts in; None for the built-in text of each split.
      progress: called with (stage, done, total).

    Raises:
      UserError: texts are longer than half of the model's context or too short for their facts, or the questions
        cannot be read.
    """
    method = GemFilter(
        filter_layer=0,
        keep=plan.keep,
        normalisation="sink",
        band=model.preset.default.band,
        filter_attention=plan.filter_attention,
        filter_precision=plan.filter_precision,
        segment=plan.tokens * 9 // 8,
    )
    config = model.checkpoint.model.config
    if plan.tokens > config.context // 2:
        raise UserError(f"tokens is {plan.tokens}; the model reads {config.context}, at most half of which is tried")

    def recorded(split: SplitName) -> list[Recorded]:
        examples = list(_examples(model, plan, split, paragraphs))
        made: list[Recorded] = []
        for kind, example in examples:
            made.append(dataclasses.replace(record(model, example, method, plan.layers), kind=kind))
            progress(f"reading, {split}", len(made), len(examples))
        return made

    train, held_out = recorded("train"), recorded("held_out")
    judged = []
    for layer in range(plan.layers):
        judged.append(judge(train, held_out, layer, (plan.keep // 2, plan.keep), method))
        progress("learning", len(judged), plan.layers)
    return judged, _preset(model, plan, method, judged, len(train), held_out)


def _examples(
    model: Pipeline, plan: Plan, split: SplitName, paragraphs: Sequence[str] | None
) -> Iterator[tuple[str, Example]]:
    """Questions of a split and their kinds."""
    training = split == "train"
    count = plan.train if training else plan.held_out
    tokenizer = model.checkpoint.tokenizer
    short = (plan.tokens // 2, plan.tokens * 3 // 4, plan.tokens) if training else (plan.tokens,) * 3
    sizes = (*short, *short[:2], plan.tokens * _LONG)
    for index, size in enumerate(sizes[:count]):
        own = len(range(index, count, len(sizes)))
        hidden = HiddenFacts(
            count=own,
            split=split,
            distractors=plan.distractors,
            seed=plan.seed + index,
            paragraphs=None if paragraphs is None else tuple(paragraphs),
        )
        unlike = NoLiteralMatch(count=own, split=split, seed=plan.seed + index)
        for task in (hidden, unlike):
            for example in task.examples(tokenizer, size):
                yield task.name, example
    for index, (own, joined) in enumerate(_about_documents(tokenizer, split, plan.seed)[:count]):
        yield "documents", own if index % len(sizes) < len(sizes) - 1 else joined
    if plan.questions is not None:
        real = RealQuestions(questions_file=plan.questions, only="verbatim", seed=plan.seed)
        documents = sorted({example.text for example in real.examples(tokenizer, 0)})
        if len(documents) < 2:
            raise UserError(f"{plan.questions}: one document has verbatim answers, expected two or more")
        half = set(random.Random(plan.seed).sample(documents, len(documents) // 2))
        for example in real.examples(tokenizer, 0):
            if (example.text in half) == training:
                yield real.name, example


def _about_documents(
    tokenizer: "PreTrainedTokenizerBase", split: SplitName, seed: int
) -> list[tuple[Example, Example]]:
    """The package's questions about documents, one of each in turn: of the document alone, and of several joined."""
    own, joined = (
        {
            example.name: example
            for example in RealQuestions(
                questions_file=documents_file(split), only="verbatim", join=join, seed=seed
            ).examples(tokenizer, 0)
        }
        for join in (1, _LONG)
    )
    names = random.Random(seed).sample(list(own), len(own))
    before: collections.Counter[str] = collections.Counter()
    turns = {}
    for name in names:
        document = name.partition(".")[0]
        turns[name] = before[document]
        before[document] += 1
    return [(own[name], joined[name]) for name in sorted(names, key=turns.__getitem__)]


def documents_file(split: SplitName) -> str:
    """The file of the questions that come with the package."""
    return str(importlib.resources.files("gemfilter_jax.evals.data") / f"documents_{split}.jsonl")


def _preset(
    model: Pipeline,
    plan: Plan,
    method: GemFilter,
    judged: Sequence[LayerRecall],
    learned_on: int,
    held_out: Sequence[Recorded],
) -> Preset:
    most = max(one.learned[-1].balanced for one in judged)
    best = next(one for one in judged if one.learned[-1].balanced >= plan.target * most)
    kept, asked = best.learned[-1].counts
    low, high = best.learned[-1].interval
    kinds = ", ".join(f"{name} {kept} of {asked}" for name, (kept, asked) in best.learned[-1].kept.items())
    ranking = best.learned[-1].ranking
    source = (
        f"gemfilter calibrate: heads up to layer {best.layer} kept {kept} of {asked} held-out answers "
        f"({kept / asked:.0%}, 95 % interval {low:.0%} to {high:.0%}; {kinds}) with {plan.keep} tokens of texts of "
        f"{plan.tokens} to {plan.tokens * _LONG} tokens and of documents, the earliest layer with {plan.target:.0%} of "
        f"the best one's recall; heads learned on {learned_on} other questions"
    )
    return Preset(
        name=model.preset.name if model.preset.name != "none" else model.checkpoint.name,
        default=dataclasses.replace(
            method,
            filter_layer=best.layer,
            heads=tuple(map(str, ranking.heads)),
            sharpness=best.sharpness,
            recall_fit=recall_fit(held_out, ranking, best.sharpness, plan.keep),
            recall=AUTO_RECALL,
        ),
        paper_layer=model.preset.paper_layer,
        source=source,
        recall=tuple(row for one in judged for row in _rows(one)),
    )


def _rows(judged: LayerRecall) -> Iterator[dict[str, Any]]:
    for kind in ("learned", "alike", "attention"):
        for one in getattr(judged, kind):
            heads = [str(head) for head in one.ranking.heads]
            yield {
                "layer": judged.layer,
                "kind": kind,
                "heads": heads,
                "keep": one.keep,
                "kept": {kind: list(counts) for kind, counts in one.kept.items()},
            }
