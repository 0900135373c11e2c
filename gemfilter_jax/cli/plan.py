"""Tell whether a model, a prompt and some devices fit together: bytes, FLOPs and seconds, with no weights at hand.

  gemfilter plan --model=llama-3.1-8b --tokens=131072 --topology=v5e:2x4
  gemfilter plan --model=folder/config.json --tokens=65536 --topology=cpu:4 --mesh=seq:4 --format=json

The programs of both stages are compiled for the topology, by libtpu for TPU chips, which need not be there.
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
    "A published model such as llama-3.1-8b, a config.json, or what other commands take; weights are not read.",
    flag_values=FLAGS,
)
flags.DEFINE_enum("weights", "float", ["float", "int8"], "How matrices are held.", flag_values=FLAGS)
flags.DEFINE_integer("tokens", None, "Of the prompt.", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_integer("batch", 1, "Prompts at once.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string(
    "topology", None, "Chips and how they are wired, such as v5e:2x4 or v5p:2x2x2; or cpu:8.", flag_values=FLAGS
)
flags.DEFINE_string(
    "mesh", None, "How it is cut, such as data:1,seq:4,model:2; the first that fits if not given.", flag_values=FLAGS
)
flags.DEFINE_integer("keep", None, "Tokens to keep; the preset's if not given.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "filter_layer", None, "The layer that picks; the preset's if not given.", lower_bound=0, flag_values=FLAGS
)
options.define_filter_pass(FLAGS, attention=None, precision=None)
flags.DEFINE_integer("max_new_tokens", 128, "Tokens to write.", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_enum("format", "text", ["text", "json"], "Of what is printed.", flag_values=FLAGS)
flags.DEFINE_string("output", None, "Write the plan as JSON to this file.", flag_values=FLAGS)


def main(_: list[str]) -> None:
    """The command."""
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
    method = presets.preset_for(config).default
    names = ("keep", "filter_layer", "filter_attention", "filter_precision")
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
