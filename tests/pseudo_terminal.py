"""Commands on a pseudo-terminal: what a person sees there, and what comes of Ctrl-C and of a window made narrow."""

import errno
import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from typing import NamedTuple, Self

GEMFILTER = [sys.executable, "-m", "gemfilter_jax.cli.main"]
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_TOO_LONG = 200  # seconds


class Seen(NamedTuple):
    """What a command wrote to its terminal, with what status it ended, and after how many seconds."""

    text: str
    status: int
    seconds: float


class Terminal:
    """A command that runs on a pseudo-terminal, its controlling one: its standard input, output and error.

    What is typed is not echoed. The command is killed if the block ends before it does.
    """

    def __init__(self, *arguments: str, columns: int = 200, **environment: str):
        self._ours, theirs = os.openpty()
        self.resize(columns)
        attributes = termios.tcgetattr(theirs)
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(theirs, termios.TCSANOW, attributes)
        inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        # The first terminal that the leader of a session opens becomes its controlling one.
        opening = ["sh", "-c", 'exec "$@" 0<>"$0" 1>&0 2>&0', os.ttyname(theirs)]
        self._began = time.monotonic()
        self.process = subprocess.Popen(
            [*opening, *GEMFILTER, *arguments],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=inherited | {"TERM": "xterm"} | environment,
        )
        self._seen = bytearray()
        self._reader = threading.Thread(target=self._read, args=(theirs,), daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        os.close(self._ours)

    def _read(self, theirs: int) -> None:
        """Read until the command, and whatever it started, has closed the terminal.

        `theirs` is held open until the command has ended, lest its end be read before it has opened the terminal.
        """
        while True:
            if theirs >= 0 and self.process.poll() is not None:
                os.close(theirs)
                theirs = -1
            if not select.select([self._ours], [], [], 0.01)[0]:
                continue
            try:
                self._seen += os.read(self._ours, 65536)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                return

    def type(self, typed: str | bytes) -> None:
        os.write(self._ours, typed.encode() if isinstance(typed, str) else typed)

    def resize(self, columns: int) -> None:
        """Change the width of the window, which the command hears of by SIGWINCH."""
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))

    def send(self, number: signal.Signals) -> None:
        """Type Ctrl-C, or send another signal."""
        if number == signal.SIGINT:
            self.type(b"\x03")
        else:
            self.process.send_signal(number)

    def wait_for(self, shown: str) -> None:
        """Wait until the command has written a text."""
        while shown.encode() not in self._seen:
            assert self.process.poll() is None, self._seen[-3000:]
            assert time.monotonic() - self._began < _TOO_LONG, self._seen[-3000:]
            time.sleep(0.005)

    def sleep_until(self, moment: float) -> bool:
        """Wait until so many seconds after the start; whether the command still runs then."""
        time.sleep(max(self._began + moment - time.monotonic(), 0))
        return self.process.poll() is None

    def finish(self) -> Seen:
        """Wait for the end of the command."""
        status = self.process.wait(_TOO_LONG)
        seconds = time.monotonic() - self._began
        self._reader.join()
        return Seen(self._seen.decode(), status, seconds)


def on_terminal(*arguments: str, typed: str = "", columns: int = 200, **environment: str) -> Seen:
    """A command from its start to its end, with what is typed into it at once."""
    with Terminal(*arguments, columns=columns, **environment) as terminal:
        terminal.type(typed)
        return terminal.finish()


def plain(text: str) -> str:
    """What a terminal was sent, without the control sequences of colours, the cursor and the like."""
    return _CONTROL.sub("", text).replace("\r\n", "\n")


def lines(text: str) -> list[str]:
    """The lines that stay on the screen: without control sequences, and what a carriage return overwrites."""
    return [line.rpartition("\r")[2] for line in plain(text).split("\n")]
