"""Tell whether a prompt fits on some devices, and what it takes: bytes, FLOPs and seconds. No weights are needed.

  gemfilter plan --model=llama-3.1-8b --tokens=131072 --topology=v5e:2x4
  gemfilter plan --model=folder/config.json --tokens=65536 --topology=cpu:4 --mesh=seq:4 --format=json

The programs of both stages are compiled for the topology. The chips need not be present: libtpu compiles for TPUs on
any machine.
"""

import dataclasses
import json
from typing import TYPE_CHECKING

from absl import flags

from gemfilter_jax import files
from gemfilter_jax.cli import command, options
from gemfilter_jax.errors import UserError
from gemfilter_jax.planning import chips

if TYPE_CHECKING:
    from gemfilter_jax.planning.plan import Request

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "model",
    None,
    "A published model such as llama-3.1-8b, a config.json, or a --model of other commands; weights are not read.",
    flag_values=FLAGS,
)
flags.DEFINE_enum("weights", "float", ["float", "int8"], "Storage of weight matrices.", flag_values=FLAGS)
flags.DEFINE_integer(
    "tokens", None, "Length of the prompt.", lower_bound=2, upper_bound=options.LONGEST_TEXT, flag_values=FLAGS
)
flags.DEFINE_integer("batch", 1, "Prompts at a time.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("topology", None, "Chips, such as v5e:2x4 or v5p:2x2x2, or cpu:8.", flag_values=FLAGS)
flags.DEFINE_string(
    "mesh", None, "Device mesh, such as data:1,seq:4,model:2. Default: the first that fits.", flag_values=FLAGS
)
flags.DEFINE_integer("keep", None, "Tokens to keep. Default: the preset's.", lower_bound=1, flag_values=FLAGS)
options.define_options(FLAGS, ["filter_layer", "filter_attention", "filter_precision"])
flags.DEFINE_integer("max_new_tokens", 128, "Longest answer, in tokens.", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_enum("format", "text", ["text", "json"], "Output format.", flag_values=FLAGS)
flags.DEFINE_string("output", None, "Write the plan as JSON to this file.", flag_values=FLAGS)


def main(_: list[str]) -> None:
    """Run the command."""
    for name in ("model", "tokens", "topology"):
        if FLAGS[name].value is None:
            raise UserError(f"no --{name}; see --help")
    topology = chips.Topology.parse(FLAGS.topology)
    if FLAGS.output:
        files.check_writable(FLAGS.output, "output")
    chips.prepare_process(topology)

    from rich.console import Console

    from gemfilter_jax.parallel.sharding import MeshShape
    from gemfilter_jax.planning import plan
    from gemfilter_jax.reporting import plans, terminal

    request = _request()
    with terminal.status(options.console(), "compiling"):
        made = plan.make(request, topology, FLAGS.mesh and MeshShape.parse(FLAGS.mesh))
        larger = None if made.fits else plan.smallest_that_fits(made)
    result = {
        **plan.as_json(made),
        "model": FLAGS.model,
        "fits_on": str(larger or topology) if larger or made.fits else None,
        "versions": chips.versions(topology),
    }
    text = json.dumps(result, indent=1) + "\n"
    if FLAGS.output:
        files.write_whole(FLAGS.output, text)
    if FLAGS.format == "json":
        print(text, end="")
    else:
        plans.show(Console(), FLAGS.model, made, larger)


def _request() -> "Request":
    from gemfilter_jax.methods import presets
    from gemfilter_jax.planning import models
    from gemfilter_jax.planning.plan import Request

    config = models.config_of(FLAGS.model)
    method = presets.preset_for(config).method("default", filter_layer=FLAGS.filter_layer)
    names = ("keep", "filter_attention", "filter_precision")
    given = {name: FLAGS[name].value for name in names if FLAGS[name].value is not None}
    return Request(
        config,
        FLAGS.tokens,
        dataclasses.replace(method, **given),
        new_tokens=FLAGS.max_new_tokens,
        batch=FLAGS.batch,
        int8=FLAGS.weights == "int8",
    )


def run() -> None:
    """Parse the command line and run."""
    command.run(main, FLAGS, str(__doc__))


if __name__ == "__main__":
    run()
