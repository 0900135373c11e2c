"""One run in several processes, on one host or many: how each starts and ends, and which of them speaks.

JAX ends a process from C++ when another process of its run is gone, so no Python code of it is left to say why. A shell
beside each process waits for its end and says it then.
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
"""In which all processes of a run must have found one another."""
_HEARTBEAT_SECONDS = 10
"""A process that was not heard of for so long counts as dead, and the run ends."""
_PARTING_SECONDS = 5
"""How long a process that failed waits for others that fail alike, so that each can say why."""

_LISTENING = 'while read -r line; do words=$line; done; [ -z "$words" ] || printf "%s\\n" "$words" >&2'

_first, _several = True, False


def is_first() -> bool:
    """Whether this process prints the answer and writes files; true outside a run of several."""
    return _first


def is_one_of_several() -> bool:
    """Whether this process is part of a run of several."""
    return _several


def of_first(number: int) -> int:
    """A number as the first process has it, on all that call this; below 2^31."""
    if not _several:
        return number
    import numpy as np
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


@contextlib.contextmanager
def joined(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> Iterator[None]:
    """Be one process of a run for the length of the block, after which all leave together.

    Must be entered before JAX uses a device. Whoever leaves by an exception, `SystemExit` included, ends here without
    waiting for the others, which end as well: at once if it was the first process, else when they miss its heartbeat.

    Args:
      coordinator: host and port where the first process listens; None takes everything from the environment, as
        `jax.distributed.initialize` finds it.
      processes: how many there are.
      process: which one this is, counted from 0.

    Raises:
      UserError: the environment does not tell, or the port is in use.
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
        jax.config.update("jax_enable_preemption_service", False)  # which would have SIGTERM end nothing
        interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own is not heard while C++ waits
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
    """End this process, together with the others if they come within the time of parting."""
    import jax

    try:
        parting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        parting.start()
        parting.join(_PARTING_SECONDS)
        sys.stdout.flush()
    finally:
        os._exit(status)


def _check_free(coordinator: str) -> None:
    """Raise a `UserError` if the port is in use, of which gRPC would die."""
    port = int(coordinator.rpartition(":")[2])
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            raise UserError(f"--coordinator={coordinator}: cannot listen there ({error.strerror})") from error


def _stdout_of_python_alone() -> None:
    """Send what C++ code prints to standard error: gloo prints its ranks, which are no part of an answer."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    os.dup2(2, 1)


@contextlib.contextmanager
def _last_words() -> Iterator[Callable[[str], None]]:
    """What to call with the line to be said on standard error if this process ends without calling it again."""
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
