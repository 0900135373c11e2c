"""gemfilter: long prompts answered from the few tokens that the model's own early layers pick.

  gemfilter generate   answer questions about a long text
  gemfilter chat       ask one question after another about a text that is read once
  gemfilter select     print what is kept of a text
  gemfilter bench      time methods on this device, full attention among them
  gemfilter evaluate   score methods on questions about long texts
  gemfilter compare    make tables and plots of what evaluate has written
  gemfilter calibrate  find the layer and heads that pick best in a model, and write them as a preset
  gemfilter fetch      get a model
  gemfilter convert    write a model as a checkpoint that loads straight onto many devices
  gemfilter plan       tell whether a model, a prompt and some devices fit together

gemfilter COMMAND --help tells a command's flags; gemfilter --version tells the version.
"""

import importlib
import sys

from gemfilter_jax.cli import signals

COMMANDS = ("generate", "chat", "select", "bench", "evaluate", "compare", "calibrate", "fetch", "convert", "plan")


def main() -> None:
    """Run the command named by the first argument."""
    signals.quiet()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h", "help"):
        _say(str(__doc__).strip())
        return
    if name == "--version":
        from importlib import metadata

        _say(f"gemfilter {metadata.version('gemfilter-jax')}")
        return
    if name not in COMMANDS:
        _refuse(name)
    sys.argv = [f"gemfilter {name}", *sys.argv[2:]]
    importlib.import_module(f"gemfilter_jax.cli.{name}").run()


def _say(text: str) -> None:
    from gemfilter_jax.cli import command

    command.open_streams()
    with command.mistakes_told("gemfilter"):
        print(text)


def _refuse(name: str) -> None:
    import difflib

    from gemfilter_jax.cli import command
    from gemfilter_jax.errors import UserError

    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(COMMANDS)}"
    command.open_streams()
    with command.mistakes_told("gemfilter"):
        raise UserError(f"unknown command {name!r}; {hint}")


if __name__ == "__main__":
    main()
