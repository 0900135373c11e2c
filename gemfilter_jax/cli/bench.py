"""Time methods on this device, in one process.

gemfilter bench --lengths=1024,2048,4096,8000 --keep=512 --output=bench.json --plot=bench.png
gemfilter bench --random_weights --shape=llama-3.1-8b --lengths=32768,130000 --filter_attentions=tri_shape,dense

Tables show medians. The JSON has every run, and which share each stage reaches of the speed of a large matrix product
or copy on this device. It is written anew after each length and batch, so that a run which is cut leaves what it has
measured.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import flags

from gemfilter_jax import files, methods
from gemfilter_jax.cli import command, options, signals
from gemfilter_jax.errors import UserError
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.parallel import processes

if TYPE_CHECKING:
    from gemfilter_jax.checkpoints import Opened
    from gemfilter_jax.evals.bench import Row
    from gemfilter_jax.evals.runner import Contestant
    from gemfilter_jax.pipeline import Pipeline
    from gemfilter_jax.planning.ceilings import Ceilings

_ATTENTIONS = next(one for one in GemFilter.options() if one.name == "filter_attention").choices
_LARGEST_BATCH = 1024

FLAGS = flags.FlagValues()
options.define_model(FLAGS)
options.define_filter(FLAGS, budgets=True)
options.define_options(FLAGS, ["order"])
options.define_comparison(FLAGS, lengths=["1024", "2048", "4096"])
options.define_distributed(FLAGS)
flags.DEFINE_list(
    "filter_attentions",
    None,
    "Measure GemFilter with each of these in place of --filter_attention, separated by commas.",
    flag_values=FLAGS,
)
flags.register_validator(
    "filter_attentions",
    lambda given: given is None or all(one in _ATTENTIONS for one in given),
    message=f"expected names among {', '.join(_ATTENTIONS)}",
    flag_values=FLAGS,
)
flags.DEFINE_list("batches", ["1"], "Numbers of prompts at a time, separated by commas.", flag_values=FLAGS)
flags.DEFINE_string(
    "output", None, "Write the result as JSON to this file, anew after each length and batch.", flag_values=FLAGS
)
flags.DEFINE_string("plot", None, "Plot time and memory by length to this file; needs matplotlib.", flag_values=FLAGS)
flags.DEFINE_bool(
    "random_weights",
    False,
    "Draw the weights of --shape, which time and memory do not depend on; answers mean nothing.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "shape",
    None,
    "With --random_weights, in place of --model: a published model such as llama-3.1-8b, or a config.json.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("max_new_tokens", 32, "Tokens that every run generates.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "repeats", 3, "Timed runs of each method, after one run to compile.", lower_bound=1, flag_values=FLAGS
)


def main(_: list[str]) -> None:
    """Run the command."""
    if processes.is_first():
        if FLAGS.output:
            files.check_writable(FLAGS.output, "output")
        options.check_plots(FLAGS, "plot")
    lengths, batches = options.lengths(FLAGS), options.counts(FLAGS, "batches", _LARGEST_BATCH, "prompts")
    options.check_methods(FLAGS)
    _check_attentions()
    _check_shape()

    from gemfilter_jax.evals import bench
    from gemfilter_jax.reporting import bench_tables, plots, terminal

    model = options.load_pipeline(FLAGS, opened=_random_weights())
    environment = bench.environment()
    title = f"{model.checkpoint.name} on {environment['device']}, {environment['machine']}, jax {environment['jax']}"
    rows: list[Row] = []
    console = options.console()
    try:
        with terminal.status(console, "measuring"):
            _measure(model, lengths, batches, rows, lambda line: terminal.remark(console, line))
    finally:  # a full disk or too little memory loses nothing that is measured
        if processes.is_first():
            for table in bench_tables.tables(rows, title):
                terminal.print_table(table)
    if FLAGS.plot and processes.is_first():
        plots.time_and_memory(rows, title, FLAGS.plot, memory=bench.memory_shown())


def _measure(
    model: "Pipeline", lengths: list[int], batches: list[int], rows: "list[Row]", remark: Callable[[str], None]
) -> None:
    """Append all rows to `rows` and write --output, after each length and batch, with a remark on all but the last."""
    from gemfilter_jax.evals import bench
    from gemfilter_jax.planning import ceilings

    contestants = _contestants(model)
    measured = ceilings.measure(model.checkpoint.model.dtype)
    made = bench.run(
        model,
        contestants,
        lengths,
        batches=batches,
        new_tokens=FLAGS.max_new_tokens,
        repeats=FLAGS.repeats,
        ceilings=measured,
    )
    wanted = len(contestants) * len(lengths) * len(batches)
    for more in made:
        rows += more
        finished = len(rows) == wanted
        if not finished:
            place = f"{more[0].prompt_tokens:,} tokens, batch {more[0].batch}"
            remark(f"measured {place}: {len(rows)} of {wanted} rows")
        if FLAGS.output and processes.is_first() and (finished or files.is_plain(FLAGS.output)):
            result = _heading(model, contestants, lengths, batches, measured) | {
                "finished": finished,
                "rows": [dataclasses.asdict(row) for row in rows],
            }
            files.write_whole(FLAGS.output, json.dumps(result, indent=1) + "\n")
            signals.say_when_stopped(f"stopped; what was measured is in {FLAGS.output}")


def _check_attentions() -> None:
    """Raise a `UserError` if --filter_attentions has nothing to be the attention of, or says it for the second time."""
    if FLAGS.filter_attentions is None:
        return
    given = ",".join(FLAGS.filter_attentions)
    if FLAGS.filter_attention is not None:
        raise UserError(f"--filter_attentions={given}: --filter_attention is given too; give one of the two")
    if not any(methods.VARIANTS[name] is GemFilter for name in options.method_names(FLAGS)):
        raise UserError(f"--filter_attentions={given} is for {', '.join(GemFilter.variants)}; name one in --method")


def _check_shape() -> None:
    """Raise a `UserError` if --model, --shape and --random_weights do not name one model."""
    if FLAGS.shape is not None and not FLAGS.random_weights:
        raise UserError(f"--shape={FLAGS.shape} has no weights; give --random_weights as well, or --model instead")
    if FLAGS.shape is not None and FLAGS["model"].present:
        raise UserError(f"--model={FLAGS.model} and --shape={FLAGS.shape} are two models; give one of the two")
    if FLAGS.shape is None and FLAGS.random_weights:
        raise UserError("--random_weights needs --shape=NAME, such as llama-3.1-8b, or --shape=config.json")


def _random_weights() -> "Opened | None":
    """The model of --shape; None where --model has weights."""
    if FLAGS.shape is None:
        return None
    from gemfilter_jax.checkpoints import RandomWeights
    from gemfilter_jax.planning import models

    return RandomWeights(models.config_of(FLAGS.shape), FLAGS.shape)


def _contestants(model: "Pipeline") -> "list[Contestant]":
    """The methods to measure, those of GemFilter with each filter attention."""

    def with_attention(one: "Contestant", attention: str) -> "Contestant":
        return dataclasses.replace(one, method=dataclasses.replace(one.method, filter_attention=attention))

    attentions = dict.fromkeys(FLAGS.filter_attentions or ())
    made: list[Contestant] = []
    for one in options.contestants(FLAGS, model):
        several = attentions and isinstance(one.method, GemFilter)
        made += [with_attention(one, attention) for attention in attentions] if several else [one]
    return made


def _heading(
    model: "Pipeline",
    contestants: "list[Contestant]",
    lengths: list[int],
    batches: list[int],
    ceilings: "Ceilings",
) -> dict[str, Any]:
    """What a result file says of its run."""
    from gemfilter_jax.evals import bench
    from gemfilter_jax.parallel import sharding

    return {
        "command": "bench",
        "model": model.checkpoint.name,
        "shape": bench.shape(model.checkpoint.model),
        "dtype": str(model.checkpoint.model.dtype),
        "weights": FLAGS.weights,
        "attention": FLAGS.attention,
        "mesh": dataclasses.asdict(sharding.shape_of(model.checkpoint.model.mesh)),
        "environment": bench.environment(),
        "ceilings": dataclasses.asdict(ceilings),
        "lengths": lengths,
        "batches": batches,
        "repeats": FLAGS.repeats,
        "new_tokens": FLAGS.max_new_tokens,
        "methods": [{"method": one.name, "keep": one.keep, "options": one.method.fields} for one in contestants],
    }


def run() -> None:
    """Parse the command line and run."""
    command.run(main, FLAGS, str(__doc__))


if __name__ == "__main__":
    run()
