"""Answer the questions of a task by one method or several, and print their scores.

gemfilter evaluate --task=needles --lengths=2048,4096 --keep=256,512 --method=full,default,bm25
gemfilter evaluate --task=hidden_facts --lengths=4096 --keep=512 --output=facts.jsonl
gemfilter evaluate --task=real_questions --questions_file=questions.jsonl --method=default,bm25 --output=real.jsonl

With --output each result is written as it comes, and a run that was stopped goes on from there. gemfilter compare makes
tables and plots of such files.
"""

import contextlib
import dataclasses
import pathlib
import sys
from typing import TYPE_CHECKING

from absl import flags

from gemfilter_jax import files
from gemfilter_jax.cli import command, options, signals
from gemfilter_jax.errors import UserError
from gemfilter_jax.evals import result_file
from gemfilter_jax.evals.tasks import TASKS
from gemfilter_jax.parallel import processes
from gemfilter_jax.settings import Option

if TYPE_CHECKING:  # commands parse their flags before they import JAX, so that a mistake is told at once
    from typing import Any

    from gemfilter_jax.evals.runner import Contestant
    from gemfilter_jax.evals.task import Task
    from gemfilter_jax.pipeline import Pipeline

_LONGEST_COUNT = 9  # digits of the number of shards


def _define_tasks(values: flags.FlagValues) -> None:
    """Define --task, and a flag for each option of the tasks; tasks may share option names."""
    told = " ".join(f"{name}: {_first_paragraph(task)}" for name, task in TASKS.items())
    flags.DEFINE_enum("task", next(iter(TASKS)), list(TASKS), f"The task. {told}", flag_values=values)
    shared: dict[str, Option] = {}
    helps: dict[str, list[str]] = {}
    for task in TASKS.values():
        for one in task.options():
            shared[one.name] = dataclasses.replace(one, at_least=None, at_most=None)  # bounds are each task's own
            default = "" if one.default is None else f" Default: {one.default}."
            bounds = f" A number {one.range}." if one.range else ""
            helps.setdefault(one.name, []).append(f"{task.name}: {one.help}{bounds}{default}")
    for name, one in shared.items():
        options.define_option(values, dataclasses.replace(one, help=" ".join(helps[name])), None)


def _first_paragraph(task: "type[Task]") -> str:
    return " ".join(str(task.__doc__).split("\n\n")[0].split())


FLAGS = flags.FlagValues()
options.define_model(FLAGS)
options.define_filter(FLAGS, budgets=True)
options.define_options(FLAGS, ["order"])
options.define_comparison(FLAGS, lengths=["2048"])
options.define_distributed(FLAGS)
flags.DEFINE_string(
    "output", None, "Write the results to this file, a JSON object a line; go on if it exists.", flag_values=FLAGS
)
flags.DEFINE_string(
    "shard",
    None,
    "Part of the texts to ask about, as I/N: of N parts the one numbered I, from 1. Each needs its own --output.",
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    "answer", True, "Answer the questions; if not, only what methods keep of the texts is scored.", flag_values=FLAGS
)
_define_tasks(FLAGS)


def main(_: list[str]) -> None:
    """Run the command."""
    path = pathlib.Path(FLAGS.output) if FLAGS.output and processes.is_first() else None
    if path:
        files.check_writable(FLAGS.output, "output")
    lengths = options.lengths(FLAGS)
    options.check_methods(FLAGS)
    task = _chosen_task()
    if not FLAGS.answer and not task.scores_kept:
        raise UserError(f"--noanswer scores what is kept, and --task={task.name} does not say what should be")
    if not task.sized and FLAGS["lengths"].present:
        raise UserError(f"--lengths means nothing to --task={task.name}, whose texts have lengths of their own")
    shard = _shard()
    if path:
        signals.say_when_stopped(f"stopped; the same command goes on from {path}")
    with files.growing(path) if path else contextlib.nullcontext() as output:
        _evaluate(task, lengths, shard, output)


def _evaluate(task: "Task", lengths: list[int], shard: tuple[int, int], output: files.GrowingFile | None) -> None:
    """Run what is left of a run, and print the table of the whole."""
    from gemfilter_jax.evals import runner
    from gemfilter_jax.reporting import score_tables, terminal

    model = options.load_pipeline(FLAGS)
    contestants = options.contestants(FLAGS, model)
    if evicting := [one.name for one in contestants if one.method.eviction is not None and not FLAGS.answer]:
        raise UserError(f"--noanswer scores what is kept of the text, and {evicting[0]} keeps keys and values")
    progress = options.console()
    with terminal.status(progress, "making examples"):
        tokenizer = model.checkpoint.tokenizer
        asked = runner.trials(task, tokenizer, lengths, contestants, shard=shard)
    heading = _heading(task, lengths, contestants, model, len(asked), shard)
    lines = list(result_file.resume(output, heading, asked).lines) if output else []
    done = processes.of_first(len(lines))
    with score_tables.running(progress, lines, len(asked), heading["main_score"]) as report:
        for trial, outcome in runner.run(model, task, asked[done:], answer=FLAGS.answer):
            lines.append(result_file.Line.of(trial, outcome))
            if output:
                result_file.append(output, lines[-1])
            report(lines[-1])
    if processes.is_first():
        results = result_file.ResultFile(heading, tuple(lines))
        terminal.print_table(score_tables.rich_table(results))
        for remark in score_tables.remarks(results):
            print(remark, file=sys.stderr)


def _heading(
    task: "Task",
    lengths: list[int],
    contestants: "list[Contestant]",
    model: "Pipeline",
    trials: int,
    shard: tuple[int, int],
) -> "dict[str, Any]":
    """What a result file says of its run."""
    from gemfilter_jax.evals import bench

    return {
        "command": "evaluate",
        "task": task.name,
        "title": task.title,
        "parts": task.parts,
        "answer": FLAGS.answer,
        "main_score": task.main_score if FLAGS.answer else "kept",
        "options": task.settings,
        "lengths": lengths if task.sized else None,
        "trials": trials,
        "methods": [{"method": one.name, "keep": one.keep, "options": one.method.fields} for one in contestants],
        "model": model.checkpoint.name,
        "dtype": str(model.checkpoint.model.dtype),
        "weights": FLAGS.weights,
        "chat_template": model.chat_template and bool(model.checkpoint.tokenizer.chat_template),
        "message_format": model.message_format,
        "shard": f"{shard[0] + 1}/{shard[1]}" if FLAGS.shard else None,
        "environment": bench.environment(),
    }


def _shard() -> tuple[int, int]:
    """--shard as (index from 0, number of parts)."""
    if FLAGS.shard is None:
        return 0, 1
    index, slash, count = FLAGS.shard.partition("/")
    numbers = slash and index.isdecimal() and count.isdecimal() and len(count) <= _LONGEST_COUNT
    if not (numbers and len(index) <= len(count) and 1 <= int(index) <= int(count)):
        raise UserError(f"--shard={FLAGS.shard}: expected I/N with I from 1 to N, such as 2/8")
    return int(index) - 1, int(count)


def _chosen_task() -> "Task":
    """The task of --task with the options that were given.

    Raises:
      UserError: an option belongs to another task or is out of bounds.
    """
    chosen = TASKS[FLAGS.task]
    own = {one.name: one for one in chosen.options()}
    given = {}
    for name in dict.fromkeys(one.name for task in TASKS.values() for one in task.options()):
        if not FLAGS[name].present:
            continue
        if name not in own:
            others = [task.name for task in TASKS.values() if name in (one.name for one in task.options())]
            raise UserError(
                f"--{name} means nothing to --task={chosen.name}; "
                f"give {' or '.join(f'--task={other}' for other in others)} as well"
            )
        given[name] = FLAGS[name].value
        own[name].check(given[name], f"--{name}={given[name]}: ")
    return chosen(**given)


def run() -> None:
    """Parse the command line and run."""
    command.run(main, FLAGS, str(__doc__))


if __name__ == "__main__":
    run()
