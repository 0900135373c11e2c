"""Ctrl-C and SIGTERM end a command within a second, whatever it does.

Python's own handlers wait until the main thread is back from C++, where XLA may compile or run a program for many
seconds, and an exception may come up in the middle of an import. Here a thread hears of a signal at once, removes what
is half written, and ends the process.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

from gemfilter_jax import files

_SHOW_CURSOR = "\x1b[?25h"
_WITHOUT_CURSOR = ("dumb", "unknown")

_farewell = ""


def quiet() -> None:
    """Let Ctrl-C end the process without a traceback until `answered` takes over."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def say_when_stopped(farewell: str) -> None:
    """Set the line that is printed when a signal ends the command."""
    global _farewell
    _farewell = farewell


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """End the process on SIGINT and SIGTERM, with the status that a shell gives for them.

    Signals that the process ignores, as after nohup, stay ignored.
    """
    numbers = [one for one in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(one) is not signal.SIG_IGN]
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _leave_it_to_the_thread) for number in numbers}
    threading.Thread(target=_wait, args=(reading, numbers), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writing)


def _leave_it_to_the_thread(*_: object) -> None: ...


def _wait(reading: int, numbers: list[signal.Signals]) -> None:
    """Wait for a signal, or for the end of `answered`."""
    with os.fdopen(reading, "rb", buffering=0) as heard:
        while came := heard.read(1):
            if came[0] in numbers:
                _leave(128 + came[0])


def _leave(status: int) -> NoReturn:
    try:
        if sys.stderr.isatty() and os.environ.get("TERM") not in _WITHOUT_CURSOR:
            os.write(sys.stderr.fileno(), _SHOW_CURSOR.encode())
        # Not through sys.stderr, whose lock the main thread may hold.
        os.write(sys.stderr.fileno(), f"\n{_farewell}\n".encode() if _farewell else b"\n")
        # What the main thread says of files that are taken from it is no news.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        files.discard_asides()
    finally:
        os._exit(status)
