"""Answer the questions of an evaluation task by one method or several, and print their scores.

gemfilter evaluate --lengths=2048 --keep=512
gemfilter evaluate --lengths=32000 --keep=1024 --method=default
gemfilter evaluate --questions=held_out --lengths=2048 --keep=512
"""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from absl import flags

from gemfilter_jax import files
from gemfilter_jax.cli import command, options
from gemfilter_jax.errors import UserError
from gemfilter_jax.evals import summary
from gemfilter_jax.evals.tasks import TASKS
from gemfilter_jax.parallel import processes
from gemfilter_jax.settings import Option

if TYPE_CHECKING:  # commands parse their flags before they import JAX, so that a mistake is told at once
    from collections.abc import Mapping, Sequence

    from gemfilter_jax.evals.example import Outcome
    from gemfilter_jax.evals.task import Task
    from gemfilter_jax.methods.base import Method

_SHARED_COLUMNS = ("method", "text tokens", "keep")


def _define_tasks(values: flags.FlagValues) -> None:
    """Define --questions, and a flag for each option of the tasks; tasks may share option names."""
    told = " ".join(f"{name}: {_first_paragraph(task)}" for name, task in TASKS.items())
    flags.DEFINE_enum("questions", next(iter(TASKS)), list(TASKS), f"The task. {told}", flag_values=values)
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
options.define_filter(FLAGS)
options.define_options(FLAGS, ["order"])
options.define_comparison(FLAGS, lengths=["2048"])
options.define_distributed(FLAGS)
_define_tasks(FLAGS)


def main(_: list[str]) -> None:
    """Run the command."""
    if FLAGS.output and processes.is_first():
        files.check_writable(FLAGS.output, "output")
    lengths = options.lengths(FLAGS)
    task = _chosen_task()

    from rich.console import Console
    from rich.progress import track

    from gemfilter_jax.evals import bench, runner
    from gemfilter_jax.reporting import terminal

    model = options.load_pipeline(FLAGS)
    methods = options.compared_methods(FLAGS, model)
    heading = {
        "command": "evaluate",
        "task": task.name,
        "model": model.checkpoint.name,
        "dtype": str(model.checkpoint.model.dtype),
        "environment": bench.environment(),
    }
    if task.settings:
        heading["questions"] = task.settings
    progress = options.console()
    with terminal.status(progress, "making examples"):
        examples = [one for length in lengths for one in task.examples(model.checkpoint.tokenizer, length)]
    outcomes: dict[str, list[Outcome]] = {name: [] for name in methods}
    asked = runner.run(model, task, methods, examples)
    total, quiet = len(examples) * len(methods), not progress.is_terminal
    for name, outcome in track(asked, "asking", total=total, console=progress, transient=True, disable=quiet):
        outcomes[name].append(outcome)
        if FLAGS.output and processes.is_first():  # after each answer, so that a run cut short leaves what it has
            files.write_whole(FLAGS.output, json.dumps(heading | _result(task, methods, outcomes), indent=1) + "\n")
    if not processes.is_first():
        return
    table = terminal.table(f"{task.title}, {model.checkpoint.name}", *_table(task, methods, outcomes))
    Console().print(table)


def _chosen_task() -> "Task":
    """The task of --questions with the options that were given.

    Raises:
      UserError: an option belongs to another task or is out of bounds.
    """
    chosen = TASKS[FLAGS.questions]
    own = {one.name: one for one in chosen.options()}
    given = {}
    for name in dict.fromkeys(one.name for task in TASKS.values() for one in task.options()):
        if not FLAGS[name].present:
            continue
        if name not in own:
            others = [task.name for task in TASKS.values() if name in (one.name for one in task.options())]
            raise UserError(
                f"--{name} means nothing to --questions={chosen.name}; "
                f"give {' or '.join(f'--questions={other}' for other in others)} as well"
            )
        given[name] = FLAGS[name].value
        own[name].check(given[name], f"--{name}={given[name]}: ")
    return chosen(**given)


def _table(
    task: "Task", methods: "Mapping[str, Method]", outcomes: "Mapping[str, Sequence[Outcome]]"
) -> tuple[list[str], list[list[str]]]:
    """The columns, and the cells of each method at each length for which answers exist so far."""
    columns = task.columns or summary.columns_of(next(one.scores for own in outcomes.values() for one in own))
    rows = []
    for name, method in methods.items():
        keep = "all" if method.budget is None else f"{method.budget:,}"
        for tokens, counted in summary.by_length(outcomes[name]).items():
            rows.append([name, f"{tokens:,}", keep, *(column.cell(counted) for column in columns)])
    return [*_SHARED_COLUMNS, *(column.heading for column in columns)], rows


def _result(
    task: "Task", methods: "Mapping[str, Method]", outcomes: "Mapping[str, Sequence[Outcome]]"
) -> dict[str, Any]:
    columns, rows = _table(task, methods, outcomes)
    return {
        "rows": [dict(zip(columns, row, strict=True)) for row in rows],
        "cases": [{"method": name, **_fields(one)} for name, own in outcomes.items() for one in own],
    }


def _fields(outcome: "Outcome") -> dict[str, Any]:
    """The JSON fields of an outcome."""
    example = outcome.example
    return {
        "tokens": example.tokens,
        "name": example.name,
        "depth": None if example.depth is None else round(example.depth, 3),
        "question": example.question,
        "expected": example.references,
        "answer": outcome.answer,
        **{name: value if isinstance(value, bool) else round(value, 3) for name, value in outcome.scores.items()},
        "seconds": {stage: round(seconds, 2) for stage, seconds in outcome.timings.items()},
    }


def run() -> None:
    """Parse the command line and run."""
    command.run(main, FLAGS, str(__doc__))


if __name__ == "__main__":
    run()
