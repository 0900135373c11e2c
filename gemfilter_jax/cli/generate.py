"""Answer a question of a long text from the few tokens that the model's early layers pick.

  gemfilter generate --prompt_file=book.txt --question="Who is the narrator?"

The answer goes to standard output as it is written; tokens read and kept, layers run and seconds per stage go to
standard error. JSON has prompt_tokens, kept_tokens, indices, spans (character offsets into the prompt), timings, text
and stop_reason.
"""

import json
import sys

from absl import flags

from gemfilter_jax import files
from gemfilter_jax.cli import command, options

FLAGS = flags.FlagValues()
options.define_model(FLAGS)
options.define_prompt(FLAGS)
options.define_rule(FLAGS)
options.define_filter(FLAGS)
flags.DEFINE_integer("max_new_tokens", 128, "Tokens to write at most.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("temperature", 0.0, "0 is greedy.", lower_bound=0.0, flag_values=FLAGS)
flags.DEFINE_integer("top_k", 0, "Draw among this many likeliest tokens; 0 is all.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_float(
    "top_p", 1.0, "Draw among the fewest tokens that hold this share.", lower_bound=0.0, upper_bound=1.0,
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer("seed", 0, "Of the draws.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_bool("show_kept", False, "Show the kept passages, highlighted, on standard error.", flag_values=FLAGS)


def main(_: list[str]) -> None:
    """The command."""
    text = options.read_prompt(FLAGS)
    if FLAGS.report:
        files.check_writable(FLAGS.report, "report")

    from rich.console import Console

    from gemfilter_jax.reporting import html, terminal
    from gemfilter_jax.sampling import Sampling

    console = Console(stderr=True)
    model = options.load_pipeline(FLAGS)
    method = options.chosen_method(FLAGS, model)
    as_json = FLAGS.format == "json"

    def write(piece: str) -> None:
        print(piece, end="", flush=True)

    with terminal.reading_progress(console) as progress:
        result = model.generate(
            text,
            FLAGS.question,
            method=method,
            max_new_tokens=FLAGS.max_new_tokens,
            sampling=Sampling(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p),
            seed=FLAGS.seed,
            on_text=None if as_json else write,
            progress=progress,
        )
    if as_json:
        print(json.dumps(options.kept_fields(result.selection, result.timings) | {
            "text": result.text, "stop_reason": result.stop_reason,
        }))  # fmt: skip
    else:
        print()
    if FLAGS.show_kept:
        terminal.show_kept(console, result.selection)
    if FLAGS.report:
        files.write_whole(FLAGS.report, html.page(result.selection, FLAGS.question, result.text))
    layers = options.layers_run(model, method)
    print(terminal.closing_lines(result.selection, layers, result.timings), file=sys.stderr)


def run() -> None:
    """Parse the command line and run."""
    command.run(main, FLAGS, str(__doc__))


if __name__ == "__main__":
    run()
