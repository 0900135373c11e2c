"""Count right answers on facts hidden in long texts, and how many of the facts were kept.

  gemfilter evaluate --lengths=2048 --keep=512
  gemfilter evaluate --lengths=32000 --keep=1024 --method=default
  gemfilter evaluate --questions=held_out --count=100 --facts=2 --lengths=2048 --keep=512

needles are four facts, each hidden at three depths of essays; held_out are facts of about thirty kinds at random
places, among others that look like them. An answer is right if it contains the key word of every fact it is asked for.
"""

import itertools
import json
import pathlib
from typing import TYPE_CHECKING, Any

from absl import flags

from gemfilter_jax import files
from gemfilter_jax.cli import command, options
from gemfilter_jax.errors import UserError
from gemfilter_jax.evals import haystack
from gemfilter_jax.parallel import processes

if TYPE_CHECKING:  # commands parse their flags before they import JAX, so that a mistake is told at once
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from gemfilter_jax.evals.examples import Case, Outcome
    from gemfilter_jax.methods.gemfilter.method import Method

FLAGS = flags.FlagValues()
options.define_model(FLAGS)
options.define_filter(FLAGS)
options.define_order(FLAGS)
options.define_comparison(FLAGS, lengths=["2048"])
options.define_distributed(FLAGS)
flags.DEFINE_enum("questions", "needles", ["needles", "held_out"], "What is asked.", flag_values=FLAGS)
_HELD_OUT = [
    flags.DEFINE_integer("count", 60, "Questions of each length.", lower_bound=1, flag_values=FLAGS),
    flags.DEFINE_integer("facts", 1, "Facts in a question.", lower_bound=1, upper_bound=4, flag_values=FLAGS),
    flags.DEFINE_integer("distractors", 2, "Facts like the asked ones in the text.", lower_bound=0, flag_values=FLAGS),
    flags.DEFINE_integer(
        "per_text", 1, "Questions asked of each text, which is read once for them.", lower_bound=1, flag_values=FLAGS
    ),
    flags.DEFINE_integer("seed", 0, "Of which facts are asked for, and where they are.", flag_values=FLAGS),
    flags.DEFINE_string("texts", None, "Hide facts in the .txt and .md files of this folder.", flag_values=FLAGS),
]

_SHARED_COLUMNS = ("method", "text tokens", "keep")
_COLUMNS = {
    "needles": (*_SHARED_COLUMNS, "right", "asked", "needle kept"),
    "held_out": (*_SHARED_COLUMNS, "asked", "right (95 %)", "facts kept", "all kept (95 %)"),
}


def main(_: list[str]) -> None:
    """The command."""
    if FLAGS.output and processes.is_first():
        files.check_writable(FLAGS.output, "output")
    lengths = options.lengths(FLAGS)
    given = [flag.name for flag in _HELD_OUT if flag.present]
    if given and FLAGS.questions == "needles":
        raise UserError(f"--{given[0]} means nothing to --questions=needles; give --questions=held_out as well")
    if FLAGS.per_text > 1 and FLAGS.facts > 1:
        raise UserError(
            f"--per_text={FLAGS.per_text}: such questions ask for one fact, leave --facts={FLAGS.facts} out"
        )
    paragraphs = haystack.read_folder(pathlib.Path(FLAGS.texts)) if FLAGS.texts is not None else None

    from rich.console import Console
    from rich.progress import track

    from gemfilter_jax.evals import bench, examples
    from gemfilter_jax.reporting import terminal

    model = options.load_pipeline(FLAGS)
    methods = options.compared_methods(FLAGS, model)
    heading = {
        "command": "evaluate",
        "model": model.checkpoint.name,
        "dtype": str(model.checkpoint.model.dtype),
        "environment": bench.environment(),
    }
    if FLAGS.questions == "held_out":
        heading["questions"] = {flag.name: flag.value for flag in _HELD_OUT}
    progress = options.console()
    with terminal.status(progress, "hiding facts"):
        cases = [case for length in lengths for case in _cases(model.checkpoint.tokenizer, length, paragraphs)]
    asked = [(name, case) for case in cases for name in methods]
    outcomes: dict[str, list[Outcome]] = {name: [] for name in methods}
    asking = {name: examples.Asking(model, method) for name, method in methods.items()}
    for name, case in track(asked, "asking", console=progress, transient=True, disable=not progress.is_terminal):
        outcomes[name].append(asking[name](case, shared=FLAGS.per_text > 1))
        if FLAGS.output and processes.is_first():  # after each answer, so that a run cut short leaves what it has
            files.write_whole(FLAGS.output, json.dumps(heading | _result(methods, outcomes), indent=1) + "\n")
    if not processes.is_first():
        return
    rows = _rows(methods, outcomes)
    Console().print(terminal.table(f"Hidden facts, {model.checkpoint.name}", _COLUMNS[FLAGS.questions], rows))


def _cases(tokenizer: "PreTrainedTokenizerBase", tokens: int, paragraphs: "Sequence[str] | None") -> "Iterator[Case]":
    from gemfilter_jax.evals.tasks import hidden_facts, needles

    if FLAGS.questions == "needles":
        return needles.cases(tokenizer, tokens)
    if FLAGS.per_text > 1:
        counts = [min(FLAGS.per_text, FLAGS.count - done) for done in range(0, FLAGS.count, FLAGS.per_text)]
        return itertools.chain.from_iterable(
            hidden_facts.document(
                tokenizer,
                tokens,
                count,
                distractors=FLAGS.distractors,
                seed=FLAGS.seed + index,
                paragraphs=paragraphs,
            )
            for index, count in enumerate(counts)
        )
    return hidden_facts.cases(
        tokenizer,
        tokens,
        FLAGS.count,
        facts=FLAGS.facts,
        distractors=FLAGS.distractors,
        seed=FLAGS.seed,
        paragraphs=paragraphs,
    )


def _rows(methods: "Mapping[str, Method]", outcomes: "Mapping[str, Sequence[Outcome]]") -> list[list[str]]:
    """The cells of each method at each length that has been asked so far."""
    from gemfilter_jax.evals import summary
    from gemfilter_jax.methods.gemfilter.method import GemFilter

    rows = []
    for name, method in methods.items():
        keep = f"{method.keep:,}" if isinstance(method, GemFilter) else "all"
        for tokens, counted in summary.by_length(outcomes[name]).items():
            asked = str(counted.asked)
            if FLAGS.questions == "needles":
                cells = [str(counted.right), asked, f"{counted.kept:.2f}"]
            else:
                right, all_kept = (_with_interval(count, counted.asked) for count in (counted.right, counted.all_kept))
                cells = [asked, right, f"{counted.facts_kept:.2f}", all_kept]
            rows.append([name, f"{tokens:,}", keep, *cells])
    return rows


def _with_interval(count: int, asked: int) -> str:
    """As "41 (.56-.79)", so that a row fits 80 columns."""
    from gemfilter_jax.evals import summary

    bounds = (f"{bound:.2f}".removeprefix("0") for bound in summary.wilson(count, asked))
    return f"{count} ({'-'.join(bounds)})"


def _result(methods: "Mapping[str, Method]", outcomes: "Mapping[str, Sequence[Outcome]]") -> dict[str, Any]:
    return {
        "rows": [dict(zip(_COLUMNS[FLAGS.questions], row, strict=True)) for row in _rows(methods, outcomes)],
        "cases": [
            {
                "method": name,
                "tokens": outcome.case.tokens,
                "name": outcome.case.name,
                "depth": round(outcome.case.depth, 3),
                "question": outcome.case.question,
                "expected": outcome.case.answers,
                "answer": outcome.answer,
                "right": outcome.right,
                "kept": round(outcome.kept, 3),
                "facts_kept": round(outcome.facts_kept, 3),
                "seconds": {stage: round(seconds, 2) for stage, seconds in outcome.timings.items()},
            }
            for name, own in outcomes.items()
            for outcome in own
        ],
    }


def run() -> None:
    """Parse the command line and run."""
    command.run(main, FLAGS, str(__doc__))


if __name__ == "__main__":
    run()
