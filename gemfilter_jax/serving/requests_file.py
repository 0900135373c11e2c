"""Many requests of one file, answered in batches into an output that grows by whole lines.

Each line of the output begins with the number and a digest of the request that it answers, so that a run that was cut
off goes on where it stopped.
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

if TYPE_CHECKING:  # so that a command's mistakes are told before JAX is imported
    from gemfilter_jax.generate.sampling import Sampling
    from gemfilter_jax.methods.gemfilter.method import GemFilter
    from gemfilter_jax.pipeline import Pipeline, Result

_FIELDS = {"prompt": str, "prompt_file": str, "question": str, "id": (str, int, float)}


@dataclasses.dataclass(frozen=True)
class Run:
    """A requests file and how far its output has come.

    Attributes:
      requests, output: the files.
      total: requests.
      finished: how many of them, from the first, have their line in the output.
      size: bytes that these lines take.
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
      heading: how its line in the output begins.
      text, question: see `Pipeline.generate`.
      error: why it cannot be asked.
    """

    heading: dict[str, Any]
    text: str = ""
    question: str | None = None
    error: str | None = None


def resume(requests: pathlib.Path, output: pathlib.Path) -> Run:
    """Look how far a run has come; changes nothing.

    Raises:
      UserError: the requests cannot be read, the output cannot be written, or a line of it answers another request.
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
    method: "GemFilter",
    max_new_tokens: int,
    sampling: "Sampling",
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Answer what is left of a run; returns how many requests failed.

    Args:
      batch: requests that are answered together, and reach the disk together.
      seed: request n draws with seed + n - 1.
      progress: called with (requests finished, requests) before each batch.

    Raises:
      UserError: the settings serve no request, or the output cannot be written. What is wrong with a single request
        becomes its line.
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
    """As many in a row as have `size` that can be asked among them: each size is a program of its own to XLA."""
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
    """Raise a `UserError` unless this is a field of requests with a value of its type."""
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
    """What became of requests asked together, or one by one where one of them fails."""
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
    """Write lines after the first `size` bytes of the output, down to the disk; returns its new size.

    Of several processes that answer the same requests only the first writes.
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
