"""Answer questions about a long text from the few tokens that the model's early layers pick.

  gemfilter generate --prompt_file=book.txt --question="Who is the narrator?"
  gemfilter generate --prompts=requests.jsonl --output=answers.jsonl

The answer goes to standard output as it is written; tokens read and kept, layers run and seconds per stage go to
standard error. JSON has prompt_tokens, kept_tokens, indices, spans (character offsets into the prompt), timings, text
and stop_reason. --question may be given several times: the text is then read once for all of them, and JSON is one
line for each, with the question.

--prompts answers many requests, each a JSON object on a line of its own:

  {"prompt_file": "book.txt", "question": "Who is the narrator?", "id": "book 1"}
  {"prompt": "A long text, and the question that it ends in?"}

prompt_file is relative to the folder of the requests, and lies inside it unless --outside_files is given; question and
id, a string or a number, may be left out. Blank lines are passed over. --output gets one line for each request, in
their order: request (its line, from 1), of (a digest of that line), id if it has one, and then either the JSON above,
with timings of the whole batch, or error. Request n draws with --seed + n - 1.

The output grows by whole lines. If a run is cut off, the same command continues after the last of them. Existing lines
stay, answers and errors alike, even if flags differ. If their requests have changed, the run is refused, and so is a
second run with the same --output at the same time. More requests may be added at the end.
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
from typing import TYPE_CHECKING

from absl import flags

from gemfilter_jax import files
from gemfilter_jax.cli import command, options, signals
from gemfilter_jax.errors import UserError
from gemfilter_jax.parallel import processes
from gemfilter_jax.serving import requests_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from gemfilter_jax.methods.base import Method
    from gemfilter_jax.pipeline import Pipeline
    from gemfilter_jax.results import Result

FLAGS = flags.FlagValues()
options.define_model(FLAGS)
options.define_prompt_file(FLAGS, otherwise="Default: standard input.")
options.define_kept_text(FLAGS)
options.define_rule(FLAGS)
options.define_filter(FLAGS)
options.define_options(FLAGS, ["order"])
options.define_answer(FLAGS)
options.define_document_cache(FLAGS)
options.define_distributed(FLAGS)
flags.DEFINE_multi_string(
    "question",
    [],
    "Question about the text; may be given several times. Default: the text ends in its question.",
    flag_values=FLAGS,
)
flags.DEFINE_string("prompts", None, "File with many requests, one JSON object a line.", flag_values=FLAGS)
flags.DEFINE_string("output", None, "With --prompts: file that answers are appended to.", flag_values=FLAGS)
flags.DEFINE_integer(
    "batch", 8, "With --prompts: requests answered together. Fewer take less memory.", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_bool(
    "outside_files",
    False,
    "With --prompts: read each prompt_file that there is, not only those in the folder of the requests.",
    flag_values=FLAGS,
)
_OF_ONE = ("prompt_file", "question", "format", "report", "show_kept", "document_cache")
_OF_MANY = ("output", "batch", "outside_files")


def main(_: list[str]) -> None:
    """Run the command."""
    if FLAGS.prompts is None:
        _refuse(_OF_MANY, "needs --prompts")
        _answer_one_text()
    else:
        _refuse(_OF_ONE, "cannot be given with --prompts; each request has a text and a question of its own")
        _answer_requests()


def _refuse(names: tuple[str, ...], reason: str) -> None:
    given = [name for name in names if FLAGS[name].present]
    if given:
        raise UserError(f"--{given[0]} {reason}")


def _answer_requests() -> None:
    if FLAGS.output is None:
        raise UserError("--prompts needs --output=FILE, which the answers are added to")
    if processes.is_first():
        files.check_writable(FLAGS.output, "output")
        signals.say_when_stopped(f"stopped; the same command goes on from {FLAGS.output}")
    output = FLAGS.output if processes.is_first() else os.devnull
    with files.growing(pathlib.Path(output)) as file:
        begun = requests_file.resume(pathlib.Path(FLAGS.prompts), file)
        begun = dataclasses.replace(begun, finished=processes.of_first(begun.finished))
        failed = _answer_rest(begun) if begun.finished < begun.total else 0
    if not processes.is_first():
        return
    answered = begun.total - begun.finished - failed
    print(f"answered {answered:,}, failed {failed:,}, already there {begun.finished:,}", file=sys.stderr)


def _answer_rest(begun: requests_file.Run) -> int:
    from gemfilter_jax.reporting import terminal

    model = options.load_pipeline(FLAGS, many_prompts=True)
    method = options.chosen_method(FLAGS, model)
    with terminal.stages_progress(options.console()) as progress:
        return requests_file.answer(
            model,
            begun,
            batch=FLAGS.batch,
            method=method,
            outside=FLAGS.outside_files,
            progress=functools.partial(progress, "answering"),
            **options.answer_settings(FLAGS),
        )


def _answer_one_text() -> None:
    if any(not question.strip() for question in FLAGS.question):
        raise UserError("--question is empty; ask something, or leave it out")
    options.check_document_cache(FLAGS)
    text = options.read_prompt(FLAGS)
    if FLAGS.report:
        if processes.is_first():
            files.check_writable(FLAGS.report, "report")
        if len(FLAGS.question) > 1:
            raise UserError(f"--report={FLAGS.report}: shows one question; {len(FLAGS.question)} were given")
    if FLAGS.document_cache is not None and not FLAGS.question:
        raise UserError(f"--document_cache={FLAGS.document_cache}: needs --question, which is not part of the text")
    if FLAGS.document_cache is not None and processes.is_one_of_several():
        raise UserError(
            f"--document_cache={FLAGS.document_cache}: a run of several processes keeps nothing of the text"
        )

    model = options.load_pipeline(FLAGS)
    method = options.chosen_method(FLAGS, model)
    from gemfilter_jax.reporting import terminal

    if len(FLAGS.question) > 1 or FLAGS.document_cache is not None:
        document = model.document(text, method=method, cache=FLAGS.document_cache)
        for question in FLAGS.question:
            if len(FLAGS.question) > 1 and FLAGS.format == "text" and processes.is_first():
                terminal.write(question)
            _answer(model, method, question, functools.partial(document.ask, question))
    else:
        question = FLAGS.question[0] if FLAGS.question else None
        _answer(model, method, question, functools.partial(model.generate, text, question, method=method))


def _answer(model: "Pipeline", method: "Method", question: str | None, ask: "Callable[..., Result]") -> None:
    """Ask one question and print the result; `ask` takes the settings of the answer."""
    as_json = FLAGS.format == "json"
    if not processes.is_first():
        ask(on_text=None if as_json else lambda _: None, **options.answer_settings(FLAGS))
        return

    from gemfilter_jax.reporting import prompt_page, terminal

    on_text = None if as_json else terminal.writer("> " if len(FLAGS.question) > 1 else "")
    with terminal.reading_progress(options.console()) as progress:
        result = ask(on_text=on_text, progress=progress, **options.answer_settings(FLAGS))
    if as_json:
        asked = {"question": question} if len(FLAGS.question) > 1 else {}
        print(json.dumps(result.fields | asked))
    else:
        print()
    if FLAGS.report:
        files.write_whole(FLAGS.report, prompt_page.page(result.selection, question, result.text))
    options.tell_kept(FLAGS, model, method, result)


def run() -> None:
    """Parse the command line and run."""
    command.run(main, FLAGS, str(__doc__))


if __name__ == "__main__":
    run()
