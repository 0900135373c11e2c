"""Count right answers on facts hidden in long texts.

  gemfilter evaluate --lengths=2048 --keep=512
  gemfilter evaluate --lengths=32000 --keep=1024 --method=default

Four facts, each hidden at three depths of essays, are asked for; an answer is right if it contains the fact's key word.
"""

import json

from absl import flags

from gemfilter_jax import files
from gemfilter_jax.cli import command, options

FLAGS = flags.FlagValues()
options.define_model(FLAGS)
options.define_filter(FLAGS)
options.define_comparison(FLAGS, lengths=["2048"])

_COLUMNS = ("method", "text tokens", "keep", "right", "asked", "needle kept")


def main(_: list[str]) -> None:
    """The command."""
    if FLAGS.output:
        files.check_writable(FLAGS.output, "output")
    lengths = options.lengths(FLAGS)

    from rich.console import Console
    from rich.progress import track

    from gemfilter_jax.evaluation import bench, needle
    from gemfilter_jax.methods import GemFilter
    from gemfilter_jax.reporting import terminal

    model = options.load_pipeline(FLAGS)
    methods = options.compared_methods(FLAGS, model)
    cases = [case for length in lengths for case in needle.cases(model.checkpoint.tokenizer, length)]
    asked = [(name, case) for name in methods for case in cases]
    progress = Console(stderr=True)
    outcomes = [
        (name, needle.ask(model, case, methods[name]))
        for name, case in track(asked, "asking", console=progress, transient=True)
    ]
    rows = []
    for name, method in methods.items():
        for length in lengths:
            own = [outcome for asker, outcome in outcomes if asker == name and outcome.case.tokens == length]
            keep = f"{method.keep:,}" if isinstance(method, GemFilter) else "all"
            kept = sum(outcome.kept for outcome in own) / len(own)
            rows.append([name, f"{length:,}", keep, str(sum(o.right for o in own)), str(len(own)), f"{kept:.2f}"])
    Console().print(terminal.table(f"Hidden facts, {model.checkpoint.name}", _COLUMNS, rows))
    if FLAGS.output:
        result = {
            "command": "evaluate",
            "model": model.checkpoint.name,
            "dtype": str(model.checkpoint.model.dtype),
            "environment": bench.environment(),
            "rows": [dict(zip(_COLUMNS, row, strict=True)) for row in rows],
            "cases": [
                {
                    "method": name,
                    "tokens": outcome.case.tokens,
                    "depth": outcome.case.depth,
                    "question": outcome.case.needle.question,
                    "answer": outcome.answer,
                    "right": outcome.right,
                    "kept": round(outcome.kept, 3),
                }
                for name, outcome in outcomes
            ],
        }
        files.write_whole(FLAGS.output, json.dumps(result, indent=1) + "\n")


def run() -> None:
    """Parse the command line and run."""
    command.run(main, FLAGS, str(__doc__))


if __name__ == "__main__":
    run()
