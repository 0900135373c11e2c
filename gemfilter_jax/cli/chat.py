"""Ask one question after another about a long text, which is read once.

  gemfilter chat --prompt_file=book.txt

Questions come from standard input, one a line; an empty line or the end of input closes. Each is answered by itself:
earlier questions are not part of the prompt.
"""

import sys

from absl import flags

from gemfilter_jax import files
from gemfilter_jax.cli import command, options
from gemfilter_jax.errors import UserError

FLAGS = flags.FlagValues()
options.define_model(FLAGS)
options.define_prompt_file(FLAGS, otherwise="Standard input is for questions.")
options.define_rule(FLAGS)
options.define_filter(FLAGS)
options.define_options(FLAGS, ["order"])
options.define_answer(FLAGS)
options.define_document_cache(FLAGS)


_LONGEST_QUESTION = 1 << 20  # bytes; the rest of a longer line is the next question


def main(_: list[str]) -> None:
    """Run the command."""
    if FLAGS.prompt_file is None:
        raise UserError("no text; give --prompt_file=FILE (standard input is for questions)")
    if sys.stdin is None:
        raise UserError("standard input is closed; questions come from there")
    options.check_document_cache(FLAGS)
    text = options.read_prompt(FLAGS)

    from gemfilter_jax.reporting import terminal

    console = options.console()
    model = options.load_pipeline(FLAGS)
    method = options.chosen_method(FLAGS, model)
    document = model.document(text, method=method, cache=FLAGS.document_cache)
    while True:
        if sys.stdin.isatty():
            print("? ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline(_LONGEST_QUESTION)
        if not line.strip():
            return
        try:
            question = files.decoded(line, "the question").strip()
            with terminal.reading_progress(console) as progress:
                settings = options.answer_settings(FLAGS)
                result = document.ask(question, on_text=terminal.writer(), progress=progress, **settings)
        except UserError as error:  # the next question may be better
            print(error, file=sys.stderr)
            continue
        print()
        options.tell_kept(FLAGS, model, method, result)


def run() -> None:
    """Parse the command line and run."""
    command.run(main, FLAGS, str(__doc__))


if __name__ == "__main__":
    run()
