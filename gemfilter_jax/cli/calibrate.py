"""Find the earliest layer and the heads of a model that pick the right passages, and write them as a preset.

  gemfilter calibrate --model=smollm2 --output=preset.json --plot=recall.png
  gemfilter generate --preset=preset.json --prompt_file=book.txt --question="Who is the narrator?"

Facts are hidden in texts and asked for, and the attention of every head of the first layers is recorded. Head weights
are learned on one set of texts and facts and measured on another. The table shows, for each layer, the share of facts
that is kept. The preset takes the earliest layer that meets the target, or the best one if none does.
"""

import pathlib
from typing import TYPE_CHECKING

from absl import flags

from gemfilter_jax import files
from gemfilter_jax.cli import command, options
from gemfilter_jax.evals import haystack

if TYPE_CHECKING:
    from gemfilter_jax.config import ModelConfig
    from gemfilter_jax.evals.calibration import LayerRecall, Recall
    from gemfilter_jax.methods.presets import Preset

FLAGS = flags.FlagValues()
options.define_model(FLAGS)
flags.DEFINE_string("output", None, "Write the preset to this JSON file.", flag_values=FLAGS)
flags.DEFINE_string("plot", None, "Plot recall by layer and budget to this file; needs matplotlib.", flag_values=FLAGS)
flags.DEFINE_integer(
    "keep", 512, "Budget, in tokens, for which the layer is chosen.", lower_bound=64, flag_values=FLAGS
)
flags.DEFINE_float("target", 0.97, "Share of facts that must be kept.", lower_bound=0, upper_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "layers", None, "Number of first layers to try. Default: 11 of 20.", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_integer(
    "tokens", 4096, "Length of the texts that recall is measured on.", lower_bound=512, flag_values=FLAGS
)
flags.DEFINE_integer("train", 60, "Questions for learning.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("held_out", 62, "Questions for measuring.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "distractors", 2, "Facts in each text that look like the asked one.", lower_bound=0, flag_values=FLAGS
)
flags.DEFINE_string("texts", None, "Hide facts in the .txt and .md files of this folder.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Random seed of facts, their places and texts.", flag_values=FLAGS)
options.define_options(
    FLAGS, ["filter_attention", "filter_precision"], filter_attention="auto", filter_precision="int8"
)


def main(_: list[str]) -> None:
    """Run the command."""
    if FLAGS.output:
        files.check_writable(FLAGS.output, "output")
    options.check_plots(FLAGS, "plot")
    paragraphs = haystack.read_folder(pathlib.Path(FLAGS.texts)) if FLAGS.texts is not None else None

    from rich.console import Console

    from gemfilter_jax.evals import calibration
    from gemfilter_jax.methods import presets
    from gemfilter_jax.reporting import plots, terminal

    def candidates(_: "Preset", config: "ModelConfig") -> int:
        return FLAGS.layers or config.layers * 11 // 20 + 1

    model = options.load_pipeline(FLAGS, layers=candidates)
    config = model.checkpoint.model.config
    plan = calibration.Plan(
        keep=FLAGS.keep,
        target=FLAGS.target,
        layers=model.checkpoint.model.held_layers,
        tokens=FLAGS.tokens,
        train=FLAGS.train,
        held_out=FLAGS.held_out,
        distractors=FLAGS.distractors,
        seed=FLAGS.seed,
        filter_attention=FLAGS.filter_attention,
        filter_precision=FLAGS.filter_precision,
    )
    with terminal.stages_progress(options.console()) as progress:
        judged, preset = calibration.calibrate(model, plan, paragraphs=paragraphs, progress=progress)
    asked = judged[0].learned[0].facts
    title = f"Share of {asked} facts kept, 95 % interval; {model.checkpoint.name}, {FLAGS.tokens:,} tokens"
    Console().print(terminal.table(title, _columns(judged), [_cells(one) for one in judged]))
    print(preset.source)
    if FLAGS.output:
        files.write_whole(FLAGS.output, presets.write_preset(preset, config))
    if FLAGS.plot:
        plots.recall(judged, FLAGS.target, FLAGS.plot)


def _columns(judged: "list[LayerRecall]") -> list[str]:
    budgets = [one.keep for one in judged[0].learned]
    return [
        "layer and heads",
        *(f"keep {keep}" for keep in budgets),
        f"all heads, {budgets[-1]}",
        f"layers up to it, {budgets[-1]}",
    ]


def _cells(one: "LayerRecall") -> list[str]:
    def cell(recall: "Recall") -> str:
        low, high = recall.interval
        return f"{recall.share:.2f} ({low:.2f}-{high:.2f})"

    heads = one.learned[-1].heads
    named = ", ".join(f"{head}: {weight:g}" for head, weight in zip(heads.heads, heads.weights, strict=True))
    return [f"{one.layer}  {named}", *map(cell, one.learned), cell(one.alike[-1]), cell(one.up_to[-1])]


def run() -> None:
    """Parse the command line and run."""
    command.run(main, FLAGS, str(__doc__))


if __name__ == "__main__":
    run()
