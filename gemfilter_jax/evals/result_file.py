"""Result files: a heading line that says what ran, then a line of JSON for each trial, in order.

A file grows by whole lines, so that a run that was killed goes on where it stopped. Tables and plots are made from
these lines alone.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any

from gemfilter_jax.errors import UserError

if TYPE_CHECKING:
    from gemfilter_jax.evals.example import Outcome
    from gemfilter_jax.evals.runner import Trial

_WHERE_IT_RAN = "environment"
_OF_ONE_RUN = (
    *("task", "title", "main_score", "options", "answer"),
    *("model", "dtype", "weights", "chat_template", "message_format", "methods"),
)
_TYPES: dict[str, type | tuple[type, ...]] = {
    "number": int,
    "tokens": int,
    "method": str,
    "name": str,
    "group": str,
    "question": str,
    "answer": str,
    "keep": (int, str),
    "length": (int, NoneType),
    "prompt_tokens": (int, NoneType),
    "error": (str, NoneType),
    "depth": (int, float, NoneType),
    "expected": list,
    "scores": dict,
    "seconds": dict,
}


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

    @property
    def label(self) -> str:
        """See `Contestant.label`."""
        return label(self.method, self.keep)


def label(method: str, keep: int | str) -> str:
    """A method and its budget as one word."""
    return method if keep == "all" else f"{method}@{keep}"


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
      UserError: the file belongs to another run or is no result file, or cannot be written.
    """
    first = (json.dumps(heading) + "\n").encode()
    try:
        path.touch()
        with path.open("r+b") as file:
            held = file.read()
            whole = [line for line in held.splitlines(keepends=True) if line.endswith(b"\n")]
            if whole:
                found = _checked(path, whole, json.loads(first), asked)
                file.truncate(sum(map(len, whole)))
                return found
            start = first[: first.index(b",")]
            if not (start.startswith(held) or held.startswith(start)):
                raise UserError(f"{path}: is no file that gemfilter evaluate has written; give a new one")
            file.seek(0)
            file.truncate()
            file.write(first)
            return ResultFile(heading, ())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def _checked(
    path: pathlib.Path, whole: Sequence[bytes], heading: Mapping[str, Any], asked: Sequence["Trial"]
) -> ResultFile:
    """The lines of a file, all of which must be the first ones of this run."""
    found = _object(whole[0], f"{path}: line 1")
    for name in {**found, **heading}:
        if name != _WHERE_IT_RAN and found.get(name) != heading.get(name):
            raise UserError(
                f"{path}: is of another run: its {name} is {json.dumps(found.get(name))[:200]}, now it is "
                f"{json.dumps(heading.get(name))[:200]}; give a new file"
            )
    lines = [_line(line, f"{path}: line {number}") for number, line in enumerate(whole[1:], 2)]
    if len(lines) > len(asked):
        raise UserError(f"{path}: has {len(lines)} results, the run has {len(asked)}; give a new file")
    for number, (line, trial) in enumerate(zip(lines, asked, strict=False), 2):
        wanted = (trial.length, trial.number), (trial.contestant.name, trial.contestant.keep)
        if (line.example, line.contestant) != wanted or line.question != trial.example.question:
            raise UserError(f"{path}: line {number} is of another run; give a new file")
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


def read(paths: Iterable[pathlib.Path]) -> ResultFile:
    """The results of files of one run: its shards, or runs of other methods, budgets or lengths on the same examples.

    Raises:
      UserError: a file is damaged, is of another task, model or set of examples, or repeats a trial.
    """
    heading: dict[str, Any] = {}
    lines: dict[tuple, Line] = {}
    questions: dict[tuple, str] = {}
    for path in paths:
        try:
            whole = path.read_bytes().splitlines(keepends=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        found = _object(whole[0] if whole else b"", f"{path}: line 1")
        heading = _merged(heading, found, path) if heading else _with_all_fields(found, path)
        for number, text in enumerate(whole[1:], 2):
            if text.endswith(b"\n"):  # else a run is writing it, or was killed
                line = _line(text, f"{path}: line {number}")
                if (line.example, line.contestant) in lines:
                    raise UserError(f"{path}: line {number} repeats a result of {line.label} for {line.name!r}")
                if questions.setdefault(line.example, line.question) != line.question:
                    raise UserError(f"{path}: line {number} asks something else than the other files do")
                lines[line.example, line.contestant] = line
    order = list(dict.fromkeys(line.contestant for line in lines.values()))
    sort_key = {one: place for place, one in enumerate(order)}
    return ResultFile(
        heading,
        tuple(sorted(lines.values(), key=lambda one: (one.length or 0, sort_key[one.contestant], one.number))),
    )


def _with_all_fields(heading: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
    for name in _OF_ONE_RUN:
        if name not in heading:
            raise UserError(f"{path}: line 1 has no {name!r}; give a file that gemfilter evaluate has written")
    return heading


def _merged(heading: dict[str, Any], other: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """The heading of several files; a method that both have must have the same options in both."""
    _with_all_fields(other, path)
    for name in _OF_ONE_RUN:
        if name != "methods" and other[name] != heading[name]:
            raise UserError(f"{path}: its {name} is {other[name]!r}, that of the first file {heading[name]!r}")
    methods = {(one["method"], one["keep"]): one for one in heading["methods"]}
    for one in other["methods"]:
        known = methods.setdefault((one["method"], one["keep"]), one)
        if known != one:
            raise UserError(
                f"{path}: its options of {label(one['method'], one['keep'])} are {one['options']}, those of the files "
                f"before {known['options']}"
            )
    return heading | {"methods": list(methods.values())}


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
    sound = fields.keys() == _TYPES.keys() and all(isinstance(fields[name], kind) for name, kind in _TYPES.items())
    if not sound or not all(_is_number(value) for part in ("scores", "seconds") for value in fields[part].values()):
        raise UserError(f"{where} is no result: expected the fields {', '.join(sorted(_TYPES))}")
    fields["expected"] = tuple(fields["expected"])
    return Line(**fields)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
