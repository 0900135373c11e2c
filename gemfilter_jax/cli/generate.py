"""Answer questions of a long text from the few tokens that the model's early layers pick.

  gemfilter generate --prompt_file=book.txt --question="Who is the narrator?"

The answer goes to standard output as it is written; tokens read and kept, layers run and seconds per stage go to
standard error. JSON has prompt_tokens, kept_tokens, indices, spans (character offsets into the prompt), timings, text
and stop_reason. --question may be given several times: the text is then read once for all of them, and JSON is one
line for each, with the question.
"""

import functools
import json
from typing import TYPE_CHECKING

from absl import flags

from gemfilter_jax import distributed, files
from gemfilter_jax.cli import command, options
from gemfilter_jax.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gemfilter_jax.methods import GemFilter
    from gemfilter_jax.pipeline import Pipeline, Result

FLAGS = flags.FlagValues()
options.define_model(FLAGS)
options.define_prompt_file(FLAGS, otherwise="standard input if not given")
options.define_kept_text(FLAGS)
options.define_rule(FLAGS)
options.define_filter(FLAGS)
options.define_order(FLAGS)
options.define_answer(FLAGS)
options.define_document_cache(FLAGS)
options.define_distributed(FLAGS)
flags.DEFINE_multi_string(
    "question",
    [],
    "What to ask of the text, may be given several times; without it the text ends in its own question.",
    flag_values=FLAGS,
)


def main(_: list[str]) -> None:
    """The command."""
    text = options.read_prompt(FLAGS)
    if FLAGS.report:
        if distributed.is_first():
            files.check_writable(FLAGS.report, "report")
        if len(FLAGS.question) > 1:
            raise UserError(f"--report={FLAGS.report}: shows one question; {len(FLAGS.question)} were given")
    if FLAGS.document_cache is not None and not FLAGS.question:
        raise UserError(f"--document_cache={FLAGS.document_cache}: needs --question, which is not part of the text")

    model = options.load_pipeline(FLAGS)
    method = options.chosen_method(FLAGS, model)
    if len(FLAGS.question) > 1 or FLAGS.document_cache is not None:
        document = model.document(text, method=method, cache=FLAGS.document_cache)
        for question in FLAGS.question:
            if FLAGS.format == "text" and distributed.is_first():
                print(f"{question}\n> " if len(FLAGS.question) > 1 else "", end="", flush=True)
            _answer(model, method, question, functools.partial(document.ask, question))
    else:
        question = FLAGS.question[0] if FLAGS.question else None
        _answer(model, method, question, functools.partial(model.generate, text, question, method=method))


def _answer(model: "Pipeline", method: "GemFilter", question: str | None, ask: "Callable[..., Result]") -> None:
    """Ask one question and print what becomes of it; `ask` takes the settings of the answer."""
    if not distributed.is_first():
        ask(**options.answer_settings(FLAGS))
        return

    from rich.console import Console

    from gemfilter_jax.reporting import html, terminal

    as_json = FLAGS.format == "json"
    with terminal.reading_progress(Console(stderr=True)) as progress:
        result = ask(on_text=None if as_json else terminal.write, progress=progress, **options.answer_settings(FLAGS))
    if as_json:
        fields = options.kept_fields(result.selection, result.timings)
        fields |= {"text": result.text, "stop_reason": result.stop_reason}
        print(json.dumps(fields | {"question": question} if len(FLAGS.question) > 1 else fields))
    else:
        print()
    if FLAGS.report:
        files.write_whole(FLAGS.report, html.page(result.selection, question, result.text))
    options.tell_kept(FLAGS, model, method, result)


def run() -> None:
    """Parse the command line and run."""
    command.run(main, FLAGS, str(__doc__))


if __name__ == "__main__":
    run()
