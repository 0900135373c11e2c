"""Find the earliest layer and the heads of a model that pick the right passages, and write them as a preset.

  gemfilter calibrate --model=smollm2 --output=preset.json --plot=recall.png
  gemfilter generate --preset=preset.json --prompt_file=book.txt --question="Who is the narrator?"

Facts are hidden in texts and asked for, half of them in words that the facts do not share, questions are asked about
documents of eight kinds, and the attention of every head of the first layers is recorded; --questions adds documents of
your own. Weights of the heads are learned on some texts and questions and measured on others. The table shows, for each
layer, the share of answers that is kept, and balanced, which layers are compared by: the mean over the kinds of
questions, the worst counted twice. The preset takes the earliest layer that is about as good as the best; its estimate
of recall is fitted to the held-out questions.
"""

import pathlib
from typing import TYPE_CHECKING

from absl import flags

from gemfilter_jax import files
from gemfilter_jax.cli import command, options
from gemfilter_jax.errors import UserError
from gemfilter_jax.evals import haystack

if TYPE_CHECKING:
    from gemfilter_jax.config import ModelConfig
    from gemfilter_jax.evals.calibration.calibrate import LayerRecall
    from gemfilter_jax.evals.calibration.learning import Recall
    from gemfilter_jax.methods.presets import Preset

_MOST_QUESTIONS = 10_000

FLAGS = flags.FlagValues()
options.define_model(FLAGS)
flags.DEFINE_string("output", None, "Write the preset to this JSON file.", flag_values=FLAGS)
flags.DEFINE_string("plot", None, "Plot recall by layer and budget to this file; needs matplotlib.", flag_values=FLAGS)
flags.DEFINE_integer(
    "keep", 512, "Budget, in tokens, for which the layer is chosen.", lower_bound=64, flag_values=FLAGS
)
flags.DEFINE_float(
    "target",
    0.97,
    "Share of the best layer's recall that the chosen layer must have.",
    lower_bound=0,
    upper_bound=1,
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "layers", None, "Number of first layers to try. Default: two of three.", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_string(
    "questions",
    None,
    "JSONL file of questions about documents, with the fields input, instructions and outputs, to learn from and "
    "measure on besides.",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "tokens",
    4096,
    "Length of the texts that recall is measured on; one in six is four times as long.",
    lower_bound=512,
    upper_bound=options.LONGEST_TEXT // 4,
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "train",
    18,
    "Questions of each built-in kind for learning, at most 48 about documents.",
    lower_bound=1,
    upper_bound=_MOST_QUESTIONS,
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "held_out",
    18,
    "Questions of each built-in kind for measuring, at most 48 about documents.",
    lower_bound=1,
    upper_bound=_MOST_QUESTIONS,
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "distractors",
    2,
    "Facts in each text that look like the asked one.",
    lower_bound=0,
    upper_bound=_MOST_QUESTIONS,
    flag_values=FLAGS,
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

    from gemfilter_jax.evals.calibration import calibrate
    from gemfilter_jax.methods import presets
    from gemfilter_jax.reporting import plots, terminal

    def candidates(_: "Preset", config: "ModelConfig") -> int:
        if FLAGS.layers is not None and FLAGS.layers > config.layers:
            raise UserError(f"--layers={FLAGS.layers}: the model has {config.layers}")
        return FLAGS.layers or max(config.layers * 2 // 3, 1)

    model = options.load_pipeline(FLAGS, layers=candidates)
    config = model.checkpoint.model.config
    plan = calibrate.Plan(
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
        questions=FLAGS.questions,
    )
    with terminal.stages_progress(options.console()) as progress:
        judged, preset = calibrate.calibrate(model, plan, paragraphs=paragraphs, progress=progress)
    total = judged[0].learned[0].counts[1]
    title = f"Share of {total} answers kept, 95 % interval; {model.checkpoint.name}, {FLAGS.tokens:,} tokens"
    terminal.print_table(terminal.table(title, _columns(judged), [_cells(one) for one in judged]))
    print(preset.source)
    if FLAGS.output:
        files.write_whole(FLAGS.output, presets.write_preset(preset, config))
    if FLAGS.plot:
        plots.recall(judged, FLAGS.plot)


def _columns(judged: "list[LayerRecall]") -> list[str]:
    budgets = [one.keep for one in judged[0].learned]
    return [
        "layer and heads",
        *(f"keep {keep}" for keep in budgets),
        f"balanced, {budgets[-1]}",
        f"all heads alike, {budgets[-1]}",
        f"without words, {budgets[-1]}",
    ]


def _cells(one: "LayerRecall") -> list[str]:
    def cell(recall: "Recall") -> str:
        (kept, asked), (low, high) = recall.counts, recall.interval
        return f"{kept / asked:.0%} ({100 * low:.0f}-{100 * high:.0f})"

    named = " ".join(map(str, one.learned[-1].ranking.heads))
    balanced = f"{one.learned[-1].balanced:.0%}"
    return [f"{one.layer}  {named}", *map(cell, one.learned), balanced, cell(one.alike[-1]), cell(one.attention[-1])]


def run() -> None:
    """Parse the command line and run."""
    command.run(main, FLAGS, str(__doc__))


if __name__ == "__main__":
    run()
