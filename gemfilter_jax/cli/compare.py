"""Make tables and plots of result files of gemfilter evaluate.

gemfilter compare facts.jsonl
gemfilter compare shard1.jsonl shard2.jsonl --baseline=bm25 --by_group
gemfilter compare needles.jsonl --format=markdown --heat_map=needles.png --plot=budgets.png

Several files are taken together if they are of one task and model: the shards of a run, or runs of other methods,
budgets or lengths. Examples that several files have must be the same. Means have 95 % intervals. With --baseline each
method is compared with one, budget by budget, on the examples that both answered: how many it scores higher and lower,
and a p-value. Where methods estimate their recall, the estimates stand beside what was kept, in tenths of their range.
"""

import json
import pathlib
import sys

from absl import flags

from gemfilter_jax.cli import command, options
from gemfilter_jax.errors import UserError
from gemfilter_jax.evals import result_file, summary

FLAGS = flags.FlagValues()
flags.DEFINE_enum("format", "text", ["text", "markdown", "json"], "Output format.", flag_values=FLAGS)
flags.DEFINE_bool(
    "by_group",
    False,
    "In tables, a row for each part of the task, such as a dataset, and one for their average, in place of one row for "
    "all examples. JSON has no average.",
    flag_values=FLAGS,
)
flags.DEFINE_string("score", None, "The score to compare and to plot. Default: the task's own.", flag_values=FLAGS)
flags.DEFINE_string(
    "baseline", None, "The method to compare with: NAME, or NAME@KEEP for one budget.", flag_values=FLAGS
)
flags.DEFINE_string(
    "reliability",
    None,
    "Plot the estimates of recall and the share of answers kept to this file; needs matplotlib.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "heat_map",
    None,
    "Plot the score by length and part of the task, such as a needle's depth, one panel for each method and budget, to "
    "this file; needs matplotlib.",
    flag_values=FLAGS,
)
flags.DEFINE_string("plot", None, "Plot the score by budget to this file; needs matplotlib.", flag_values=FLAGS)


def main(paths: list[str]) -> None:
    """Run the command."""
    if not paths:
        raise UserError("no result file; give one or several that gemfilter evaluate --output has written")
    options.check_plots(FLAGS, "heat_map", "plot", "reliability")

    from gemfilter_jax.reporting import plots, score_tables, terminal

    results = result_file.read(map(pathlib.Path, paths))
    if not results.lines:
        raise UserError(f"{', '.join(paths)}: no results yet")
    score = FLAGS.score or results.heading["main_score"]
    known = sorted({name for line in results.lines for name in line.scores})
    if score not in known and (FLAGS.score or FLAGS.baseline or FLAGS.heat_map or FLAGS.plot):
        raise UserError(f"--score={score}: the results have {', '.join(known) or 'no score'}")
    tenths = summary.reliability(results.lines)
    if FLAGS.reliability and not tenths:
        raise UserError(f"--reliability={FLAGS.reliability}: the results have no estimates of recall")
    compared = score_tables.comparisons(results, FLAGS.baseline, score) if FLAGS.baseline else None
    if FLAGS.format == "json":
        made = score_tables.as_json(results, compared, by_group=FLAGS.by_group)
        print(json.dumps(made | {"baseline": FLAGS.baseline, "score": score}, indent=1))
    elif FLAGS.format == "markdown":
        caption = score_tables.compared_title(score, FLAGS.baseline)
        print(score_tables.markdown(results, compared, caption, by_group=FLAGS.by_group))
    else:
        terminal.print_table(score_tables.rich_table(results, by_group=FLAGS.by_group))
        if compared:
            terminal.print_table(score_tables.rich_comparison(compared, FLAGS.baseline, score))
        if tenths:
            terminal.print_table(score_tables.rich_reliability(tenths))
        for remark in score_tables.remarks(results):
            print(remark, file=sys.stderr)
    if FLAGS.heat_map:
        plots.heat_maps(results, score, FLAGS.heat_map)
    if FLAGS.plot:
        plots.by_budget(results, score, FLAGS.plot)
    if FLAGS.reliability:
        plots.reliability(results, tenths, FLAGS.reliability)


def run() -> None:
    """Parse the command line and run."""
    command.run(main, FLAGS, str(__doc__), positional="result files", several=True)


if __name__ == "__main__":
    run()
