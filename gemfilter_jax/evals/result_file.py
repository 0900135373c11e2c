"""Result files: a heading line that says what ran, then a line of JSON for each trial, in order.

A file grows by whole lines, so that a run that was killed goes on where it stopped. Tables and plots are made from
these lines alone.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from gemfilter_jax.errors import UserError

if TYPE_CHECKING:
    from gemfilter_jax.evals.example import Outcome
    from gemfilter_jax.evals.runner import Trial

_WHERE_IT_RAN = "environment"


@dataclasses.dataclass(frozen=True)
class Line:
    """A trial and its outcome.

    Attributes:
      length: the text's length as it was asked for; None if texts have lengths of their own.
      number: of the example among those of this length, from 0.
      name, group, depth, tokens: see `Example`.
      method, keep: see `Contestant`.
      expected: the references.
      scores: empty if there is an error.
      seconds: by stage.
    """

    length: int | None
    number: int
    method: str
    keep: int | str
    name: str
    group: str
    depth: float | None
    tokens: int
    question: str
    expected: tuple[str, ...]
    answer: str
    scores: Mapping[str, float]
    prompt_tokens: int | None
    seconds: Mapping[str, float]
    error: str | None = None

    @classmethod
    def of(cls, trial: "Trial", outcome: "Outcome") -> "Line":
        """The line of a trial, with numbers rounded."""
        example = trial.example
        return cls(
            length=trial.length,
            number=trial.number,
            method=trial.contestant.name,
            keep=trial.contestant.keep,
            name=example.name,
            group=example.group,
            depth=None if example.depth is None else round(example.depth, 4),
            tokens=example.tokens,
            question=example.question,
            expected=example.references,
            answer=outcome.answer,
            scores={name: round(float(value), 6) for name, value in outcome.scores.items()},
            prompt_tokens=outcome.prompt_tokens,
            seconds={stage: round(seconds, 3) for stage, seconds in outcome.timings.items()},
            error=outcome.error,
        )

    @property
    def example(self) -> tuple[int | None, int]:
        """What names the example within its task."""
        return self.length, self.number

    @property
    def contestant(self) -> tuple[str, int | str]:
        """Method and budget."""
        return self.method, self.keep


@dataclasses.dataclass(frozen=True)
class ResultFile:
    """The heading and the lines of a result file, or of several shards of one run.

    Attributes:
      heading: what ran: task and its options, model, methods, environment.
    """

    heading: Mapping[str, Any]
    lines: tuple[Line, ...]


def resume(path: pathlib.Path, heading: Mapping[str, Any], asked: Sequence["Trial"]) -> ResultFile:
    """Make a result file, or go on with one: returns what it holds and cuts a torn last line off.

    Raises:
      UserError: the file belongs to another run, or cannot be written.
    """
    first = (json.dumps(heading) + "\n").encode()
    with _opened(path) as file:
        whole = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
        if not whole:
            file.seek(0)
            file.truncate()
            file.write(first)
            return ResultFile(heading, ())
        found = _object(whole[0], f"{path}: line 1")
        for name in {**found, **heading}:
            if name != _WHERE_IT_RAN and found.get(name) != json.loads(first).get(name):
                raise UserError(
                    f"{path}: is of another run: its {name} is {json.dumps(found.get(name))[:200]}, now it is "
                    f"{json.dumps(heading.get(name))[:200]}; give a new file"
                )
        lines = [_line(line, f"{path}: line {number}") for number, line in enumerate(whole[1:], 2)]
        for number, (line, trial) in enumerate(zip(lines, asked, strict=False), 2):
            wanted = (trial.length, trial.number), (trial.contestant.name, trial.contestant.keep)
            if (line.example, line.contestant) != wanted or line.question != trial.example.question:
                raise UserError(f"{path}: line {number} is of another run; give a new file")
        if len(lines) > len(asked):
            raise UserError(f"{path}: has {len(lines)} results, the run has {len(asked)}; give a new file")
        file.truncate(sum(map(len, whole)))
    return ResultFile(found, tuple(lines))


def append(path: pathlib.Path, line: Line) -> None:
    """Add a line.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        with path.open("ab") as file:
            file.write((json.dumps(dataclasses.asdict(line)) + "\n").encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def _opened(path: pathlib.Path) -> BinaryIO:
    try:
        path.touch()
        return path.open("r+b")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def read(paths: Iterable[pathlib.Path]) -> ResultFile:
    """The results of files of one run: its shards, or runs of other methods, budgets or lengths on the same examples.

    Raises:
      UserError: a file is damaged, is of another task, model or set of examples, or repeats a trial.
    """
    heading: dict[str, Any] = {}
    lines: dict[tuple, Line] = {}
    for path in paths:
        try:
            whole = path.read_bytes().splitlines(keepends=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        found = _object(whole[0] if whole else b"", f"{path}: line 1")
        for name in ("task", "options", "answer", "model", "chat_template", "message_format"):
            if name not in found:
                raise UserError(f"{path}: line 1 has no {name!r}; give a file that gemfilter evaluate has written")
            if heading and found[name] != heading[name]:
                raise UserError(f"{path}: its {name} is {found[name]!r}, that of the first file {heading[name]!r}")
        heading = heading or found
        for number, text in enumerate(whole[1:], 2):
            if text.endswith(b"\n"):  # else a run is writing it, or was killed
                line = _line(text, f"{path}: line {number}")
                if (line.example, line.contestant) in lines:
                    raise UserError(f"{path}: line {number} repeats a result of {line.method} for {line.name!r}")
                lines[line.example, line.contestant] = line
    return ResultFile(heading, tuple(lines.values()))


def _object(text: bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); give a file that gemfilter evaluate has written") from error
    if not isinstance(fields, dict):
        raise UserError(f"{where} is not a JSON object; give a file that gemfilter evaluate has written")
    return fields


def _line(text: bytes, where: str) -> Line:
    fields = _object(text, where)
    names = {field.name for field in dataclasses.fields(Line)}
    if fields.keys() != names or not isinstance(fields["scores"], dict) or not isinstance(fields["seconds"], dict):
        raise UserError(f"{where} is no result: expected the fields {', '.join(sorted(names))}")
    fields["expected"] = tuple(fields["expected"])
    return Line(**fields)
