"""Print what GemFilter keeps of a long text, so that it can be sent to any other model.

  gemfilter select --prompt_file=book.txt --question="Who is the narrator?" --keep=512

Text is the kept passages, one after another; on a terminal they are highlighted in their surroundings. JSON has
prompt_tokens, kept_tokens, indices, spans (character offsets into the prompt), passages, text (the passages, one after
another) and timings.
"""

import json
import sys
from typing import TYPE_CHECKING

from absl import flags

from gemfilter_jax import files
from gemfilter_jax.cli import command, options
from gemfilter_jax.errors import UserError
from gemfilter_jax.parallel import processes

if TYPE_CHECKING:
    from gemfilter_jax.config import ModelConfig
    from gemfilter_jax.methods.presets import Preset

FLAGS = flags.FlagValues()
options.define_model(FLAGS)
options.define_prompt_file(FLAGS, otherwise="Default: standard input.")
options.define_kept_text(FLAGS)
options.define_rule(FLAGS)
options.define_filter(FLAGS)
options.define_distributed(FLAGS)
flags.DEFINE_string(
    "question", None, "Question about the text. Default: the text ends in its question.", flag_values=FLAGS
)


def main(_: list[str]) -> None:
    """Run the command."""
    if FLAGS["question"].present > 1:
        raise UserError("--question was given more than once; select takes one")
    if FLAGS.question is not None and not FLAGS.question.strip():
        raise UserError("--question is empty; ask something, or leave it out")
    text = options.read_prompt(FLAGS)
    if FLAGS.report and processes.is_first():
        files.check_writable(FLAGS.report, "report")

    from rich.console import Console

    from gemfilter_jax.reporting import prompt_page, terminal

    def layers(preset: "Preset", _: "ModelConfig") -> int:
        return 1 + (preset.layer(FLAGS.rule) if FLAGS.filter_layer is None else FLAGS.filter_layer)

    model = options.load_pipeline(FLAGS, layers=layers)
    method = options.chosen_method(FLAGS, model)
    with terminal.reading_progress(options.console()) as progress:
        kept, timings = model.select(text, FLAGS.question, method=method, progress=progress)
    if not processes.is_first():
        return
    if FLAGS.format == "json":
        print(json.dumps(kept.fields | {"passages": kept.passages, "text": kept.text, "timings": timings}))
    elif sys.stdout.isatty():
        terminal.show_kept(Console(), kept)
    else:
        print(kept.text)
    if FLAGS.report:
        files.write_whole(FLAGS.report, prompt_page.page(kept, FLAGS.question))
    print(terminal.closing_lines(kept, options.layers_run(model, method, kept), timings), file=sys.stderr)


def run() -> None:
    """Parse the command line and run."""
    command.run(main, FLAGS, str(__doc__))


if __name__ == "__main__":
    run()
