"""What every command shares: flags parsed, help printed, mistakes told in one line with status 2."""

import contextlib
import errno
import io
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from absl import app, flags, logging

from gemfilter_jax.cli import options, signals
from gemfilter_jax.errors import UserError, out_of_memory, printable, reason
from gemfilter_jax.settings import LARGEST_COUNT

_MISTAKE = 2
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)


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
            with mistakes_told(argv[0]):
                print(f"{doc.strip()}\n{values.get_help()}")
            sys.exit(0)
        values.append_flag_values(flags.FLAGS)
        with mistakes_told(argv[0]):
            _check_text(argv[1:])
            try:
                arguments = values(argv)
            except flags.Error as error:
                raise UserError(" ".join(str(error).split())) from error
            _check_values(values)
            if len(arguments) - 1 > bool(positional) and not several:
                raise UserError(f"unexpected argument {arguments[-1]!r}; flags begin with --")
        flags.FLAGS.mark_as_parsed()
        if flags.FLAGS["verbosity"].using_default_value:
            flags.FLAGS.verbosity = logging.WARNING
        return arguments

    def guarded(arguments: list[str]) -> None:
        # Mistakes are told within the run as well, because a process that leaves it by an exception ends there.
        with mistakes_told(arguments[0]), options.joined(values), mistakes_told(arguments[0]):
            main(arguments[1:])

    open_streams()
    with signals.answered():
        app.run(guarded, flags_parser=parse)


def open_streams() -> None:
    """Give closed standard streams a file, so that no other file takes their place; escape what cannot be encoded."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    closed = sys.stdout is None
    sys.stdout, sys.stderr = (
        stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open as long as the process
        for stream in (sys.stdout, sys.stderr)
    )
    if closed:
        _fail(sys.argv[0], "standard output is closed; send it to a file or to /dev/null")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _check_text(arguments: list[str]) -> None:
    """Raise a `UserError` if an argument has a NUL, or bytes that are not UTF-8, which are surrogates in Python."""
    for argument in arguments:
        if "\0" in argument:
            raise UserError(f"argument {argument}: holds a NUL")
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"argument {argument}: not UTF-8 at character {error.start}") from error


def _check_values(values: flags.FlagValues) -> None:
    """Raise a `UserError` if a flag is empty, is not finite, or is a number that programs cannot count to."""
    for name in values:
        most: Any = getattr(values[name].parser, "upper_bound", None)
        value = values[name].value
        if value in ("", []) and values[name].present:
            raise UserError(f"flag --{name} is empty; give a value, or leave it out")
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, float) and not math.isfinite(one):
                raise UserError(f"flag --{name}={one}: expected a finite number")
            if isinstance(one, int) and most is None and abs(one) > LARGEST_COUNT:
                raise UserError(f"flag --{name}={one}: expected at most {LARGEST_COUNT:,}")


@contextlib.contextmanager
def mistakes_told(program: str) -> Iterator[None]:
    """Print a mistake, a full disk or too little memory as one line, and exit."""
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        _fail(program, str(error))
    except BrokenPipeError:
        _discard_output()  # its reader has gone; nobody is left to tell
        sys.exit(0)
    except OSError as error:
        where = error.filename or ("standard output" if error.errno in _FULL else None)
        _fail(program, f"{where}: {error.strerror}" if where else reason(error))
    except Exception as error:
        if not out_of_memory(error):
            raise
        _fail(program, "memory is too small for this; give a shorter text, a smaller model or --weights=int8")


def _fail(program: str, message: str) -> NoReturn:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    _discard_output()
    with contextlib.suppress(OSError):
        print(f"{os.path.basename(program)}: {printable(message)}", file=sys.stderr, flush=True)
    sys.exit(_MISTAKE)


def _discard_output() -> None:
    """Send what is left in the buffer of standard output nowhere, so that Python's own flush at exit cannot fail."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
