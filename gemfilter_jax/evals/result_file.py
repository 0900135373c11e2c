"""Result files: a heading line that says what ran, then a line of JSON for each trial, in order.

A file grows by whole lines, so that a run that was killed goes on where it stopped. Tables and plots are made from
these lines alone.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any

from gemfilter_jax.errors import UserError
from gemfilter_jax.files import check_plain

if TYPE_CHECKING:
    from gemfilter_jax.evals.example import Outcome
    from gemfilter_jax.evals.runner import Trial
    from gemfilter_jax.files import GrowingFile

_WHERE_IT_RAN = "environment"
_LARGEST_FILE = 1 << 32  # bytes
_LONGEST = 1e9  # seconds
_MOST_TOKENS = 1e12
_LONGEST_SHOWN = 200  # characters of a heading's field in an error
_OF_THE_BUDGET = ("keep", "share")  # options of a method that budgets differ in
_HEADING: dict[str, type | tuple[type, ...]] = {
    "task": str,
    "title": str,
    "parts": str,
    "main_score": str,
    "answer": bool,
    "options": dict,
    "lengths": (list, NoneType),
    "trials": int,
    "shard": (str, NoneType),
    "methods": list,
    "model": str,
    "dtype": str,
    "weights": str,
    "chat_template": bool,
    "message_format": str,
}
_OF_ONE_MODEL = ("task", "model", "dtype", "weights", "chat_template", "message_format")
_METHOD: dict[str, type | tuple[type, ...]] = {"method": str, "keep": (int, str), "options": dict}
_TYPES: dict[str, type | tuple[type, ...]] = {
    "number": int,
    "tokens": int,
    "method": str,
    "name": str,
    "digest": str,
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
    "recall_estimate": (int, float, NoneType),
}


@dataclasses.dataclass(frozen=True)
class Line:
    """A trial and its outcome.

    Attributes:
      length: the text's length as it was asked for; None if texts have lengths of their own.
      number: of the example among those of this length, from 0.
      name, digest, group, depth, tokens: see `Example`.
      method, keep: see `Contestant`.
      expected: the references.
      scores: empty if there is an error.
      seconds: by stage.
      recall_estimate: see `pipeline.KeptText`; files written before there was one have none.
    """

    length: int | None
    number: int
    method: str
    keep: int | str
    name: str
    digest: str
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
    recall_estimate: float | None = None

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
            digest=example.digest,
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
            recall_estimate=None if outcome.recall_estimate is None else round(outcome.recall_estimate, 4),
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

    @property
    def generated(self) -> bool:
        """Whether the model answered, with whatever text."""
        return "prefill" in self.seconds


def label(method: str, keep: int | str) -> str:
    """A method and its budget as one word."""
    return method if keep == "all" else f"{method}@{keep}"


@dataclasses.dataclass(frozen=True)
class ResultFile:
    """The heading and the lines of a result file, or of several files of one task and model.

    Attributes:
      heading: what ran: task and its options, model, methods, number of trials, environment.
      remarks: what tables of the files do not show: unfinished runs, missing shards, other options of the task.
    """

    heading: Mapping[str, Any]
    lines: tuple[Line, ...]
    remarks: tuple[str, ...] = ()


def resume(output: "GrowingFile", heading: Mapping[str, Any], asked: Sequence["Trial"]) -> ResultFile:
    """Begin a result file, or go on with one: returns what it holds and cuts a torn last line off.

    Raises:
      UserError: the file belongs to another run or is no result file, or cannot be written.
    """
    first = (json.dumps(heading) + "\n").encode()
    held = output.held.read()
    whole = [line for line in held.splitlines(keepends=True) if line.endswith(b"\n")]
    if whole:
        found = _checked(output.path, whole, json.loads(first), asked)
        output.cut(sum(map(len, whole)))
        return found
    start = first[: first.index(f'"{_WHERE_IT_RAN}"'.encode())]
    if not (start.startswith(held) or held.startswith(start)):
        raise UserError(f"{output.path}: is no file that gemfilter evaluate has written; give a new one")
    output.cut(0)
    output.append(first)
    return ResultFile(heading, ())


def _checked(
    path: pathlib.Path, whole: Sequence[bytes], heading: Mapping[str, Any], asked: Sequence["Trial"]
) -> ResultFile:
    """The lines of a file, all of which must be the first ones of this run."""
    found = _object(whole[0], f"{path}: line 1")
    for name in {**found, **heading}:
        if name != _WHERE_IT_RAN and found.get(name) != heading.get(name):
            raise UserError(
                f"{path}: is of another run: {_difference(name, found.get(name), heading.get(name))}; give a new file, "
                "which gemfilter compare takes beside this one"
            )
    lines = [_line(line, f"{path}: line {number}") for number, line in enumerate(whole[1:], 2)]
    if len(lines) > len(asked):
        raise UserError(f"{path}: has {len(lines)} results, the run has {len(asked)}; give a new file")
    for number, (line, trial) in enumerate(zip(lines, asked, strict=False), 2):
        wanted = (trial.length, trial.number), (trial.contestant.name, trial.contestant.keep), trial.example.digest
        if (line.example, line.contestant, line.digest) != wanted:
            raise UserError(f"{path}: line {number} is of another run, or of texts that have changed; give a new file")
    return ResultFile(found, tuple(lines))


def _difference(name: str, found: Any, now: Any) -> str:
    """What differs in a field of a heading, for an error."""
    if name == "methods" and isinstance(found, list) and isinstance(now, list):
        before, after = (
            [label(one["method"], one["keep"]) for one in methods if _fits(one, _METHOD)] for methods in (found, now)
        )
        if before != after:
            return f"its methods are {', '.join(before)}, now they are {', '.join(after)}"
    shown = (json.dumps(value) for value in (found, now))
    was, is_now = (one if len(one) <= _LONGEST_SHOWN else f"{one[:_LONGEST_SHOWN]}..." for one in shown)
    return f"its field {name!r} is {was}, now it is {is_now}"


def append(output: "GrowingFile", line: Line) -> None:
    """Add a line; raises as `GrowingFile.append`."""
    output.append((json.dumps(dataclasses.asdict(line)) + "\n").encode())


def read(paths: Iterable[pathlib.Path]) -> ResultFile:
    """The results of files of one task and model: shards of a run, or runs of other methods, budgets or lengths.

    Raises:
      UserError: a file is damaged, is of another task or model, repeats a trial, or has another example in the place of
        one that the files before have.
    """
    headings: list[dict[str, Any]] = []
    lines: dict[tuple, Line] = {}
    examples: dict[tuple, str] = {}
    missing = []
    for path in paths:
        check_plain(path, _LARGEST_FILE)
        try:
            whole = path.read_bytes().splitlines(keepends=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        headings.append(_heading(whole[0] if whole else b"", path))
        _check_alike(headings, path)
        before = len(lines)
        for number, text in enumerate(whole[1:], 2):
            if text.endswith(b"\n"):  # else a run is writing it, or was killed
                line = _line(text, f"{path}: line {number}")
                if (line.example, line.contestant) in lines:
                    raise UserError(f"{path}: line {number} repeats a result of {line.label} for {line.name!r}")
                if examples.setdefault(line.example, line.digest) != line.digest:
                    raise UserError(
                        f"{path}: line {number}: {line.name!r} is another example than the one in its place in the "
                        "files before; compare results of the same texts and questions"
                    )
                lines[line.example, line.contestant] = line
        if len(lines) - before < headings[-1]["trials"]:
            missing.append(f"{path} is not finished: it has {len(lines) - before} of {headings[-1]['trials']} results")
    order = list(dict.fromkeys(line.contestant for line in lines.values()))
    sort_key = {one: place for place, one in enumerate(order)}
    return ResultFile(
        _merged(headings) if headings else {},
        tuple(sorted(lines.values(), key=lambda one: (one.length or 0, sort_key[one.contestant], one.number))),
        (*missing, *_missing_shards(headings), *_other_options(headings)),
    )


def _heading(text: bytes, path: pathlib.Path) -> dict[str, Any]:
    """The heading of a file."""
    heading = _object(text, f"{path}: line 1")
    wrong = [name for name, kind in _HEADING.items() if not isinstance(heading.get(name, ...), kind)]
    if not wrong:
        sound = {
            "methods": all(_fits(one, _METHOD) for one in heading["methods"]),
            "lengths": all(isinstance(length, int) for length in heading["lengths"] or ()),
            "shard": heading["shard"] is None or re.fullmatch(r"[1-9]\d{0,8}/[1-9]\d{0,8}", heading["shard"]),
        }
        wrong = [name for name, fits in sound.items() if not fits]
    if wrong:
        raise UserError(f"{path}: line 1 lacks a sound {wrong[0]!r}; give a file that gemfilter evaluate has written")
    return heading


def _fits(value: Any, kinds: Mapping[str, type | tuple[type, ...]]) -> bool:
    """Whether a JSON value is an object with these fields, of these kinds."""
    if not isinstance(value, dict) or value.keys() != kinds.keys():
        return False
    return all(isinstance(value[name], kind) for name, kind in kinds.items())


def _check_alike(headings: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Raise a `UserError` if the last heading, that of `path`, cannot stand in a table with the ones before."""
    *before, last = headings
    for name in _OF_ONE_MODEL if before else ():
        if last[name] != before[0][name]:
            raise UserError(f"{path}: its {name} is {last[name]!r}, that of the first file {before[0][name]!r}")
    known = {one["method"]: one for heading in before for one in heading["methods"]}
    for one in last["methods"]:
        own, other = (
            {name: value for name, value in method["options"].items() if name not in _OF_THE_BUDGET}
            for method in (one, known.get(one["method"], one))
        )
        if own != other:
            raise UserError(f"{path}: its options of {one['method']} are {own}, those of the files before {other}")


def _merged(headings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One heading for several files: the first one, with the methods, lengths and shards of all."""
    if len(headings) == 1:
        return headings[0]
    methods = {(one["method"], one["keep"]): one for heading in headings for one in heading["methods"]}
    lengths = [length for heading in headings for length in heading["lengths"] or ()]
    shards = [heading["shard"] for heading in headings if heading["shard"] is not None]
    return headings[0] | {
        "methods": list(methods.values()),
        "lengths": list(dict.fromkeys(lengths)) or None,
        "shard": ", ".join(dict.fromkeys(shards)) or None,
        "trials": sum(heading["trials"] for heading in headings),
    }


def _missing_shards(headings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A remark for each run of which not all shards have a file."""
    runs: dict[str, set[int]] = {}
    counts: dict[str, int] = {}
    for heading in headings:
        if heading["shard"] is not None:
            index, count = map(int, heading["shard"].split("/"))
            methods = [(one["method"], one["keep"]) for one in heading["methods"]]
            run = json.dumps([count, heading["options"], heading["lengths"], heading["answer"], methods])
            runs.setdefault(run, set()).add(index)
            counts[run] = count
    return [
        f"of {counts[run]} shards of a run only these are given: {', '.join(map(str, sorted(given)))}"
        for run, given in runs.items()
        if len(given) < counts[run]
    ]


def _other_options(headings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A remark for each option of the task that differs between files."""
    remarks = []
    for name in dict.fromkeys(name for heading in headings for name in heading["options"]):
        values = list(dict.fromkeys(json.dumps(heading["options"].get(name)) for heading in headings))
        remarks += [f"files differ in {name}: {', '.join(values)}"] * (len(values) > 1)
    return remarks


def _object(text: bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); give a file that gemfilter evaluate has written") from error
    if not isinstance(fields, dict):
        raise UserError(f"{where} is not a JSON object; give a file that gemfilter evaluate has written")
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} has half of a surrogate pair, expected UTF-8") from error
    return fields


def _line(text: bytes, where: str) -> Line:
    fields = _object(text, where)
    fields.setdefault("recall_estimate", None)
    if not _fits(fields, _TYPES):
        raise UserError(f"{where} is no result: expected the fields {', '.join(sorted(_TYPES))}")
    if not all(_is_number(fields[name] or 0, _MOST_TOKENS) for name in ("tokens", "prompt_tokens")):
        raise UserError(f"{where} is no result: expected numbers of tokens")
    if not all(_is_number(value, 1) for value in (*fields["scores"].values(), fields["recall_estimate"] or 0)):
        raise UserError(f"{where} is no result: expected scores and a recall estimate from 0 to 1")
    if not all(_is_number(value, _LONGEST) for value in fields["seconds"].values()):
        raise UserError(f"{where} is no result: expected seconds of at least 0")
    if fields["scores"] and fields["error"] is not None:
        raise UserError(f"{where} is no result: it has both an error and scores")
    fields["expected"] = tuple(fields["expected"])
    return Line(**fields)


def _is_number(value: object, largest: float) -> bool:
    """Whether a JSON value is a number from 0 to `largest`; NaN is none."""
    return isinstance(value, int | float) and 0 <= value <= largest
