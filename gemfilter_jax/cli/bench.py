"""Time methods on this device, in one process.

gemfilter bench --lengths=1024,2048,4096,8000 --keep=512 --output=bench.json --plot=bench.png
gemfilter bench --model=llama-3.1-8b --random_weights --lengths=32768,130000
"""

import dataclasses
import json

from absl import flags

from gemfilter_jax import files
from gemfilter_jax.cli import command, options
from gemfilter_jax.parallel import processes

FLAGS = flags.FlagValues()
options.define_model(FLAGS)
options.define_filter(FLAGS, budgets=True)
options.define_options(FLAGS, ["order"])
options.define_comparison(FLAGS, lengths=["1024", "2048", "4096"])
options.define_distributed(FLAGS)
flags.DEFINE_string("output", None, "Write the result as JSON to this file.", flag_values=FLAGS)
flags.DEFINE_string(
    "plot", None, "Plot time and, on CPU, memory by length to this file; needs matplotlib.", flag_values=FLAGS
)
flags.DEFINE_bool(
    "random_weights",
    False,
    "Draw the weights, which time and memory do not depend on. --model may then be a shape of `gemfilter plan` or a "
    "config.json.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("max_new_tokens", 32, "Tokens that every run generates.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "repeats", 3, "Timed runs of each method, after one run to compile.", lower_bound=1, flag_values=FLAGS
)

_COLUMNS = ("method", "prompt", "kept", "filter s", "prefill s", "decode s", "total s", "full / this", "peak MB")


def main(_: list[str]) -> None:
    """Run the command."""
    if processes.is_first():
        if FLAGS.output:
            files.check_writable(FLAGS.output, "output")
        options.check_plots(FLAGS, "plot")
    lengths = options.lengths(FLAGS)
    options.check_methods(FLAGS)

    from gemfilter_jax.evals import bench
    from gemfilter_jax.reporting import plots, terminal

    model = options.load_pipeline(FLAGS)
    methods = {one.label: one.method for one in options.contestants(FLAGS, model)}
    rows = []
    with terminal.status(options.console(), "measuring"):
        for made in bench.run(model, methods, lengths, new_tokens=FLAGS.max_new_tokens, repeats=FLAGS.repeats):
            rows += made
    if not processes.is_first():
        return
    environment = bench.environment()
    title = f"{model.checkpoint.name} on {environment['device']}, {environment['machine']}, jax {environment['jax']}"
    terminal.print_table(terminal.table(title, _COLUMNS, [_cells(row) for row in rows]))
    if FLAGS.plot:
        plots.time_and_memory(rows, title, FLAGS.plot, memory=bench.peaks_are_apart())
    if FLAGS.output:
        result = {
            "command": "bench",
            "model": model.checkpoint.name,
            "dtype": str(model.checkpoint.model.dtype),
            "environment": environment,
            "repeats": FLAGS.repeats,
            "new_tokens": FLAGS.max_new_tokens,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        files.write_whole(FLAGS.output, json.dumps(result, indent=1) + "\n")


def _cells(row) -> list[str]:
    stages = [f"{row.seconds[stage]:.2f}" if stage in row.seconds else "-" for stage in ("filter", "prefill", "decode")]
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
    counts = [f"{row.prompt_tokens:,}", f"{row.kept_tokens:,}"]
    return [row.method, *counts, *stages, f"{row.total:.2f}", ratio, f"{row.peak_bytes / 1e6:,.0f}"]


def run() -> None:
    """Parse the command line and run."""
    command.run(main, FLAGS, str(__doc__))


if __name__ == "__main__":
    run()
