"""Answers the requests of a file in batches and appends the answers to an output file by whole lines.

Each output line begins with the number and a digest of its request, so that an interrupted run can continue where it
stopped.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from gemfilter_jax import files
from gemfilter_jax.errors import UserError
from gemfilter_jax.parallel import processes

if TYPE_CHECKING:  # so that a command reports mistakes before it imports JAX
    from gemfilter_jax.generate.sampling import Sampling
    from gemfilter_jax.methods.base import Method
    from gemfilter_jax.pipeline import Pipeline, Result

_FIELDS = {"prompt": str, "prompt_file": str, "question": str, "id": (str, int, float)}


@dataclasses.dataclass(frozen=True)
class Run:
    """A requests file and the progress of its output.

    Attributes:
      requests, output: the files.
      total: number of requests.
      finished: number of requests, from the first, that have a line in the output.
      size: total bytes of these lines.
    """

    requests: pathlib.Path
    output: pathlib.Path
    total: int
    finished: int
    size: int


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


def resume(requests: pathlib.Path, output: pathlib.Path) -> Run:
    """Find out how far a run has come, without changing any file.

    Raises:
      UserError: the requests cannot be read, the output cannot be written, or an output line answers another request.
    """
    total = finished = size = 0
    with _opened_requests(requests) as asked, _opened_output(output) as answered:
        for total, line in enumerate(asked, 1):
            answer = answered.readline()
            if not answer.startswith(_beginning(total, line)[: len(answer)]):
                raise UserError(
                    f"{output}: line {total} does not answer line {total} of {requests}; were the requests changed, or "
                    "is this another file? Give a new one"
                )
            if answer.endswith(b"\n"):
                finished, size = total, size + len(answer)
        if answered.readline():
            raise UserError(f"{output}: line {total + 1} answers nothing: {requests} has {total} lines; give a new one")
    if not total:
        raise UserError(f"{requests}: is empty; give one request a line")
    return Run(requests, output, total, finished, size)


def answer(
    model: "Pipeline",
    run: Run,
    *,
    batch: int,
    method: "Method",
    max_new_tokens: int,
    sampling: "Sampling",
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Answer the remaining requests of a run; returns how many failed.

    Args:
      batch: number of requests that are answered and written together.
      seed: request n is sampled with seed + n - 1.
      progress: called with (finished requests, all requests) before each batch.

    Raises:
      UserError: the settings are invalid for every request, or the output cannot be written. An error in a single
        request goes to its output line instead.
    """
    model.check(method, max_new_tokens)
    ask = functools.partial(model.generate_batch, method=method, max_new_tokens=max_new_tokens, sampling=sampling)
    failed, finished, size = 0, run.finished, run.size
    for requests in _batches(_left(run), batch):
        if progress:
            progress(finished, run.total)
        answers = _answers(ask, requests, seed)
        size = _append(run.output, size, answers)
        finished += len(answers)
        failed += sum("error" in line for line in answers)
    return failed


def _opened_requests(path: pathlib.Path) -> BinaryIO:
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not file.seekable():
        raise UserError(f"{path}: can be read only once; give a file")
    return file


def _opened_output(path: pathlib.Path) -> BinaryIO:
    try:
        return path.open("r+b")
    except FileNotFoundError:
        return io.BytesIO()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def _heading(number: int, line: bytes) -> dict[str, Any]:
    return {"request": number, "of": hashlib.sha256(line.rstrip(b"\r\n")).hexdigest()[:16]}


def _beginning(number: int, line: bytes) -> bytes:
    return json.dumps(_heading(number, line)).removesuffix("}").encode()


def _left(run: Run) -> Iterator[_Request]:
    with run.requests.open("rb") as lines:
        for number, line in itertools.islice(enumerate(lines, 1), run.finished, run.total):
            yield _read(number, line, run.requests.parent)


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


def _read(number: int, line: bytes, folder: pathlib.Path) -> _Request:
    heading = _heading(number, line)
    try:
        fields = _object(line)
        if "id" in fields:
            _check("id", fields["id"])
            heading["id"] = fields["id"]
        for name, value in fields.items():
            _check(name, value)
        return _Request(heading, _text(fields, folder), fields.get("question"))
    except UserError as error:
        return _Request(heading, error=str(error))


def _object(line: bytes) -> dict[str, Any]:
    if not line.strip():
        raise UserError("the line is empty; a request is a JSON object")
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
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{name} has half of a surrogate pair at character {error.start}") from error


def _text(fields: dict[str, Any], folder: pathlib.Path) -> str:
    if ("prompt" in fields) == ("prompt_file" in fields):
        raise UserError("give either prompt or prompt_file, and not both")
    if "prompt" in fields:
        return fields["prompt"]
    return files.read_text(folder / fields["prompt_file"], f"prompt_file {fields['prompt_file']!r}")


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
    return [result.fields for result in results]


def _append(output: pathlib.Path, size: int, answers: Sequence[dict[str, Any]]) -> int:
    """Write lines after the first `size` bytes of the output and sync them to disk; returns its new size.

    If several processes answer the same requests, only the first one writes.
    """
    data = "".join(f"{json.dumps(line)}\n" for line in answers).encode()
    if processes.is_first():
        try:
            with output.open("ab") as file:
                file.truncate(size)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{output}: cannot be written ({error.strerror})") from error
    return size + len(data)
