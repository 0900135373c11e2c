"""What every command shares: flags parsed, help printed, mistakes told in one line with status 2."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from absl import app, flags, logging

from gemfilter_jax.cli import options
from gemfilter_jax.errors import UserError

_MISTAKE = 2
_INTERRUPTED = 130


def run(
    main: Callable[[list[str]], None],
    values: flags.FlagValues,
    doc: str,
    *,
    positional: str = "",
    several: bool = False,
) -> None:
    """Run an absl main with flags of its own.

    Args:
      main: called with the positional arguments.
      values: the command's flags.
      doc: the help text above the list of flags.
      positional: what a positional argument means; empty if none is taken.
      several: whether more than one is taken.
    """
    # Hub libraries speak up at import; what they say is about PyTorch, which is not needed here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

    def parse(argv: list[str]) -> list[str]:
        if any(argument in ("-h", "-help", "--help") for argument in argv[1:]):
            with _mistakes_told(argv[0]):
                print(f"{doc.strip()}\n{values.get_help()}", flush=True)
            sys.exit(0)
        values.append_flag_values(flags.FLAGS)
        try:
            arguments = values(argv)
        except flags.Error as error:
            _fail(argv[0], str(error))
        if len(arguments) - 1 > bool(positional) and not several:
            _fail(argv[0], f"unexpected argument {arguments[-1]!r}; flags begin with --")
        flags.FLAGS.mark_as_parsed()
        if flags.FLAGS["verbosity"].using_default_value:
            flags.FLAGS.verbosity = logging.WARNING
        return arguments

    def guarded(arguments: list[str]) -> None:
        # Mistakes are told within the run as well, because a process that leaves it by an exception ends there.
        with _mistakes_told(arguments[0]), options.joined(values), _mistakes_told(arguments[0]):
            main(arguments[1:])

    app.run(guarded, flags_parser=parse)


@contextlib.contextmanager
def _mistakes_told(program: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        _fail(program, str(error))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone; nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _fail(program: str, message: str) -> None:
    print(f"{os.path.basename(program)}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(_MISTAKE)
