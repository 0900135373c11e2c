"""Write a model as an Orbax checkpoint with config and tokenizer, which loads straight onto many devices.

  gemfilter convert --model=meta-llama/Llama-3.1-8B-Instruct --output=llama-3.1-8b --dtype=bfloat16
  gemfilter convert --model=llama-3.1-8b.Q8_0.gguf --output=llama-3.1-8b-int8 --weights=int8

Every command takes the folder as --model.
"""

import pathlib

from absl import flags

from gemfilter_jax import files
from gemfilter_jax.cli import command, options
from gemfilter_jax.errors import UserError

FLAGS = flags.FlagValues()
options.define_weights(FLAGS)
flags.DEFINE_string("output", None, "Folder to write.", flag_values=FLAGS)


def main(_: list[str]) -> None:
    """Run the command."""
    if FLAGS.output is None:
        raise UserError("no --output; give a new folder")
    folder = pathlib.Path(FLAGS.output)
    files.check_new_folder(folder)

    from gemfilter_jax import checkpoints
    from gemfilter_jax.checkpoints import orbax_folder
    from gemfilter_jax.reporting import terminal

    with terminal.loading_progress(options.console()) as progress:
        loaded = checkpoints.load_checkpoint(FLAGS.model, FLAGS.dtype, weights=FLAGS.weights, progress=progress)
    orbax_folder.save(folder, loaded.name, loaded.model, loaded.tokenizer, loaded.stop_tokens)
    print(folder)


def run() -> None:
    """Parse the command line and run."""
    command.run(main, FLAGS, str(__doc__))


if __name__ == "__main__":
    run()
