"""How compare.py speaks with its workers: one JSON object a line, each answered by one, until the input ends.

A request names its action beside what that needs. The actions of every worker:

  load     reads the model; the answer holds the `versions` of what runs it
  run      answers the prompt once, greedily and to the last of the new tokens; the answer holds `seconds` (`filter`
           where there is one, `prefill` to the first new token, `decode` from there to the last, and the `total`), the
           new `tokens`, and how many tokens of the prompt the cache `held` meanwhile; for the paper's algorithm also
           `kept`, their indices
  warm_up  what comes before the first run, such as compiling or trying settings; the answer may hold `settings`, those
           that were `tried`, and what that of a run holds

An answer that holds `error` alone says in one line why there is none.

A worker in Python is a module beside this one, whose class `Runs` has a method for each action:

  PYTHON protocol.py MODULE

Nothing but Python is needed here, so that a library that the module lacks is told as any other error.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


class WorkerError(Exception):
    """A worker cannot do something, or has ended; the message is one line."""


class Worker:
    """A process that measures, one request at a time."""

    def __init__(self, command: Sequence[str]):
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"TQDM_DISABLE": "1"},  # bars of loading weights
                start_new_session=True,  # Ctrl-C is for the driver, which then closes its workers
            )
        except OSError as error:
            raise WorkerError(f"{command[0]}: {error.strerror}") from error

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def ask(self, action: str, **given: Any) -> dict[str, Any]:
        """The answer to a request; raises `WorkerError` if there is none."""
        try:
            print(json.dumps({"action": action, **given}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"the process has ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.communicate()


def _serve(module: str) -> None:
    """Answer requests by a module's `Runs`. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    runs = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            runs = runs or importlib.import_module(module).Runs()
            answer = getattr(runs, request.pop("action"))(**request)
        except Exception as error:
            answer = {"error": _reason(error)}
        print(json.dumps(answer), file=answers, flush=True)


def _reason(error: Exception) -> str:
    """One line; most messages of these kinds need no name of the kind."""
    told = (str(error).strip() or repr(error)).splitlines()[0]
    return told if isinstance(error, ValueError | ImportError) else f"{type(error).__name__}: {told}"


if __name__ == "__main__":
    _serve(sys.argv[1])
