"""A run of several processes, on one or more hosts: how each starts and ends, and which one writes the output.

When one process of a run dies, JAX ends the others from C++, so their Python code cannot report why. A shell beside
each process waits for it to end and then prints the reason.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from gemfilter_jax.errors import UserError

_START_SECONDS = 120
"""Time limit for all processes of a run to find one another."""
_HEARTBEAT_SECONDS = 10
"""A process that sends no heartbeat for this long counts as dead, and the run ends."""
_PARTING_SECONDS = 5
"""How long a failed process waits for others that fail in the same way, so that each can report its error."""

_LISTENING = 'while read -r line; do words=$line; done; [ -z "$words" ] || printf "%s\\n" "$words" >&2'

_first, _several = True, False


def is_first() -> bool:
    """Whether this process prints the answer and writes files; true outside a multi-process run."""
    return _first


def is_one_of_several() -> bool:
    """Whether this process is part of a multi-process run."""
    return _several


def of_first(number: int) -> int:
    """The first process's `number`, on every process; all must call this. It must be below 2^31."""
    if not _several:
        return number
    import numpy as np
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


@contextlib.contextmanager
def joined(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> Iterator[None]:
    """Join a multi-process run for the duration of the block; all processes leave it together.

    Enter it before JAX uses a device. If the block raises, `SystemExit` included, this process exits after waiting at
    most `_PARTING_SECONDS`. The others then end too: at once if it was the first process, else when they miss its
    heartbeat.

    Args:
      coordinator: host and port where the first process listens; None lets `jax.distributed.initialize` read all
        settings from the environment.
      processes: the number of processes.
      process: the 0-based index of this one.

    Raises:
      UserError: the environment lacks these settings, or the port is in use.
    """
    if coordinator is not None and process == 0:
        _check_free(coordinator)
    import jax

    global _first, _several
    _stdout_of_python_alone()
    program = os.path.basename(sys.argv[0])
    with _last_words() as tell:
        tell(
            f"{program}: ended before the processes of the run had found one another, which may take {_START_SECONDS} s"
        )
        jax.config.update("jax_enable_preemption_service", False)  # with it, SIGTERM would not end the process
        interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler does not run while C++ waits
        try:
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                cluster_detection_method=None if coordinator is None else "deactivate",
                initialization_timeout=_START_SECONDS,
                heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            )
        except (ValueError, RuntimeError, OSError) as error:
            tell("")
            raise UserError(
                f"--distributed: the environment does not tell of a run of several processes ({error}); give "
                "--coordinator, --processes and --process"
            ) from error
        finally:
            signal.signal(signal.SIGINT, interrupt)
        tell(f"{program}: unfinished, because another process of the run ended or this one failed or was killed")
        try:
            _first, _several = jax.process_index() == 0, True
            yield
            jax.distributed.shutdown()
        except SystemExit as error:
            tell("")
            _leave(int(error.code or 0))
        except BaseException:
            traceback.print_exc()
            _leave(1)
        tell("")


def _leave(status: int) -> NoReturn:
    """Exit this process, together with the others if they arrive within `_PARTING_SECONDS`."""
    import jax

    try:
        parting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        parting.start()
        parting.join(_PARTING_SECONDS)
        sys.stdout.flush()
    finally:
        os._exit(status)


def _check_free(coordinator: str) -> None:
    """Raise a `UserError` if the port is in use; gRPC would crash the process."""
    port = int(coordinator.rpartition(":")[2])
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            raise UserError(f"--coordinator={coordinator}: cannot listen there ({error.strerror})") from error


def _stdout_of_python_alone() -> None:
    """Redirect the output of C++ code to standard error: gloo prints its ranks, which do not belong in an answer."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    os.dup2(2, 1)


@contextlib.contextmanager
def _last_words() -> Iterator[Callable[[str], None]]:
    """Yield a function that sets the line printed to standard error when this process ends; "" prints nothing."""
    listener = subprocess.Popen(
        ["sh", "-c", _LISTENING],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        bufsize=1,
        start_new_session=True,
    )
    with listener:
        yield lambda line: print(line, file=listener.stdin)
