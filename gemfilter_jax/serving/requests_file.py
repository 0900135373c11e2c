"""Answers the requests of a file in batches and appends the answers to an output file by whole lines.

Each output line begins with the number and a digest of its request, so that an interrupted run can continue where it
stopped.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gemfilter_jax import files
from gemfilter_jax.errors import UserError, check_text, out_of_memory
from gemfilter_jax.parallel import processes

if TYPE_CHECKING:  # so that a command reports mistakes before it imports JAX
    from gemfilter_jax.generate.sampling import Sampling
    from gemfilter_jax.methods.base import Method
    from gemfilter_jax.pipeline import Pipeline
    from gemfilter_jax.results import Result

_FIELDS = {"prompt": str, "prompt_file": str, "question": str, "id": (str, int, float)}
_LONGEST_LINE = 1 << 28  # bytes
_MARK = "\ufeff".encode()
_NO_MEMORY = "memory is too small for this request"


@dataclasses.dataclass(frozen=True)
class Run:
    """A requests file and the progress of its output.

    Attributes:
      requests, output: the files; the output is ready for the line of the next request.
      total: number of requests.
      finished: number of requests, from the first, that have a line in the output.
    """

    requests: pathlib.Path
    output: files.GrowingFile
    total: int
    finished: int


@dataclasses.dataclass(frozen=True)
class _Request:
    """One line of a requests file.

    Attributes:
      heading: the first fields of its output line.
      text, question: see `Pipeline.generate`.
      error: why the request is invalid; None if it is valid.
    """

    heading: dict[str, Any]
    text: str = ""
    question: str | None = None
    error: str | None = None


def resume(requests: pathlib.Path, output: files.GrowingFile) -> Run:
    """Find out how far a run has come. Of the output a torn last line is cut off, and nothing else changed.

    Raises:
      UserError: the requests cannot be read, or an output line answers another request.
    """
    total = finished = size = number = 0
    for total, (number, line) in enumerate(_lines(requests), 1):
        answer = output.held.readline()
        if not answer.startswith(_beginning(number, line)[: len(answer)]):
            raise UserError(
                f"{output.path}: line {total} does not answer line {number} of {requests}; were the requests changed, "
                "or is this another file? Give a new one"
            )
        if answer.endswith(b"\n"):
            finished, size = total, size + len(answer)
    if output.held.readline():
        raise UserError(
            f"{output.path}: line {total + 1} answers nothing: {requests} has {total} requests; give a new one"
        )
    if not total:
        raise UserError(f"{requests}: is empty; give one request a line")
    output.cut(size)
    return Run(requests, output, total, finished)


def answer(
    model: "Pipeline",
    run: Run,
    *,
    batch: int,
    method: "Method",
    max_new_tokens: int,
    sampling: "Sampling",
    seed: int,
    outside: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Answer the remaining requests of a run; returns how many failed.

    Args:
      batch: number of requests that are answered and written together.
      seed: request n is sampled with seed + n - 1.
      outside: whether a `prompt_file` may lie outside the folder of the requests.
      progress: called with (finished requests, all requests) before each batch.

    Raises:
      UserError: the settings are invalid for every request, or the output cannot be written. An error in a single
        request goes to its output line instead.
    """
    model.check(method, max_new_tokens)
    ask = functools.partial(model.generate_batch, method=method, max_new_tokens=max_new_tokens, sampling=sampling)
    failed, finished = 0, run.finished
    for requests in _batches(_left(run, outside), batch):
        if progress:
            progress(finished, run.total)
        answers = _answers(ask, requests, seed)
        if processes.is_first():
            run.output.append("".join(f"{json.dumps(line)}\n" for line in answers).encode())
        finished += len(answers)
        failed += sum("error" in line for line in answers)
    return failed


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, each with its number from 1, without a byte-order mark."""
    files.check_plain(path)
    try:
        with path.open("rb") as file:
            for number in itertools.count(1):
                line = file.readline(_LONGEST_LINE + 1)
                if not line:
                    return
                if len(line) > _LONGEST_LINE:
                    raise UserError(f"{path}: line {number} is longer than {_LONGEST_LINE >> 20} MiB")
                line = line.removeprefix(_MARK) if number == 1 else line
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _heading(number: int, line: bytes) -> dict[str, Any]:
    return {"request": number, "of": hashlib.sha256(line.rstrip(b"\r\n")).hexdigest()[:16]}


def _beginning(number: int, line: bytes) -> bytes:
    return json.dumps(_heading(number, line)).removesuffix("}").encode()


def _left(run: Run, outside: bool) -> Iterator[_Request]:
    for number, line in itertools.islice(_lines(run.requests), run.finished, run.total):
        yield _read(number, line, run.requests.parent, outside)


def _batches(requests: Iterator[_Request], size: int) -> Iterator[list[_Request]]:
    """Consecutive requests with `size` valid ones per batch, because XLA compiles a program for each batch size."""
    batch, asked = [], 0
    for request in requests:
        batch.append(request)
        asked += request.error is None
        if asked == size:
            yield batch
            batch, asked = [], 0
    if batch:
        yield batch


def _read(number: int, line: bytes, folder: pathlib.Path, outside: bool) -> _Request:
    heading = _heading(number, line)
    try:
        fields = {name: value for name, value in _object(line).items() if value is not None}
        if "id" in fields:
            _check("id", fields["id"])
            heading["id"] = fields["id"]
        for name, value in fields.items():
            _check(name, value)
        return _Request(heading, _text(fields, folder, outside), fields.get("question"))
    except UserError as error:
        return _Request(heading, error=str(error))
    except MemoryError:
        return _Request(heading, error=_NO_MEMORY)


def _object(line: bytes) -> dict[str, Any]:
    text = files.decoded(line, "the line")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the line is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise UserError("the line is JSON, but not an object")
    return fields


def _check(name: str, value: Any) -> None:
    """Raise a `UserError` unless `name` is a request field and `value` has its type."""
    if name not in _FIELDS:
        raise UserError(f"field {name!r} is unknown; one of {', '.join(_FIELDS)}")
    if isinstance(value, bool) or not isinstance(value, _FIELDS[name]):
        raise UserError(f"{name} is not a string{' or a number' if name == 'id' else ''}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value}, which JSON has no number for")
    if isinstance(value, str):
        check_text(value, name)


def _text(fields: dict[str, Any], folder: pathlib.Path, outside: bool) -> str:
    if ("prompt" in fields) == ("prompt_file" in fields):
        raise UserError("give either prompt or prompt_file, and not both")
    if "prompt" in fields:
        return fields["prompt"]
    name = f"prompt_file {fields['prompt_file']!r}"
    try:
        inside = (folder / fields["prompt_file"]).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, a loop of symbolic links
        raise UserError(f"{name}: cannot be read ({error})") from error
    if not (inside or outside):
        raise UserError(f"{name}: lies outside the folder of the requests; --outside_files allows that")
    return files.read_text(folder / fields["prompt_file"], name, plain=True)


def _answers(ask: "Callable[..., list[Result]]", requests: Sequence[_Request], seed: int) -> list[dict[str, Any]]:
    """A line of output for each request."""
    outcomes = iter(_outcomes(ask, [request for request in requests if request.error is None], seed))
    return [
        request.heading | (next(outcomes) if request.error is None else {"error": request.error})
        for request in requests
    ]


def _outcomes(ask: "Callable[..., list[Result]]", requests: Sequence[_Request], seed: int) -> list[dict[str, Any]]:
    """The result or error of each request; requests are asked together, and one by one if that fails."""
    try:
        results = ask(
            [request.text for request in requests],
            [request.question for request in requests],
            seed=[seed + request.heading["request"] - 1 for request in requests],
        )
    except UserError as error:
        if len(requests) == 1:
            return [{"error": str(error)}]
        return [outcome for request in requests for outcome in _outcomes(ask, [request], seed)]
    except Exception as error:
        if not out_of_memory(error) or processes.is_one_of_several():
            raise
        if len(requests) == 1:
            return [{"error": _NO_MEMORY}]
        return [outcome for request in requests for outcome in _outcomes(ask, [request], seed)]
    return [result.fields for result in results]
