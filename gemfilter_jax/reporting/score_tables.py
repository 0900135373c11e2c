"""Scores of methods as tables: on a terminal, in Markdown and in JSON; and the running scores of a run."""

import collections
import contextlib
import dataclasses
import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gemfilter_jax.errors import UserError, printable
from gemfilter_jax.evals import result_file, summary
from gemfilter_jax.reporting import terminal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from gemfilter_jax.evals.result_file import Line, ResultFile
    from gemfilter_jax.evals.summary import Comparison, Summary, Tenth

_AVERAGE = "average of the parts"
_RELIABILITY = "Estimated recall and what was kept"

Compared = dict[tuple[str, int | str, int | None], "Comparison"]
"""Comparisons with a baseline by method, budget and length."""


def _columns(results: "ResultFile", *, by_group: bool) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, with a column for each score."""
    order = list(dict.fromkeys((*line.contestant, line.length) for line in results.lines))
    made = summary.summarise(results.lines, by_group=by_group)
    if by_group:
        made.sort(key=lambda one: order.index((one.method, one.keep, one.length)))
    scores = list(dict.fromkeys(name for line in results.lines for name in line.scores))
    errors, reading = any(one.errors for one in made), any(one.reading is not None for one in made)
    headings = ["method", "keep", "text tokens"]
    headings += [results.heading["parts"]] * by_group + ["examples"] + ["unanswered"] * errors
    headings += [f"{_spelled(name)} (95 %)" for name in scores] + ["seconds"] + ["reading"] * reading
    rows = []
    for _, same in itertools.groupby(made, key=lambda one: (one.method, one.keep, one.length)):
        parts = list(same)
        rows += [_cells(one, scores, by_group=by_group, errors=errors, reading=reading) for one in parts]
        if len(parts) > 1:
            rows.append(_average(parts, scores, errors=errors, reading=reading))
    return headings, rows


def _average(parts: "list[Summary]", scores: Sequence[str], *, errors: bool, reading: bool) -> list[str]:
    """Cells for the average of the parts of a task, each of which counts alike; "-" if a part has no answer."""
    tokens = sum(one.tokens * one.examples for one in parts) / sum(one.examples for one in parts)
    cells = [*_identified(dataclasses.replace(parts[0], tokens=tokens)), _AVERAGE]
    cells += [str(sum(one.examples for one in parts))] + [str(sum(one.errors for one in parts))] * errors
    for name in scores:
        values = [one.scores[name].value for one in parts if name in one.scores]
        cells.append(f"{sum(values) / len(values):.2f}" if len(values) == len(parts) else "-")
    return [*cells, *("-",) * (1 + reading)]


def _cells(one: "Summary", scores: Sequence[str], *, by_group: bool, errors: bool, reading: bool) -> list[str]:
    cells = [*_identified(one), *[one.group or "-"] * by_group, str(one.examples), *[str(one.errors)] * errors]
    for name in scores:
        value = one.scores.get(name)
        cells.append("-" if value is None else _mean(value, one))
    timed = [one.seconds, one.reading] if reading else [one.seconds]
    return [*cells, *("-" if seconds is None else f"{seconds:.1f}" for seconds in timed)]


def _identified(one: "Summary") -> list[str]:
    """Cells for method, budget and length."""
    keep = f"{one.keep:,}" if isinstance(one.keep, int) else one.keep
    return [one.method, keep, f"{one.length:,}" if one.length is not None else f"about {round(one.tokens):,}"]


def _mean(value: summary.Mean, one: "Summary") -> str:
    """A mean, with its count if not all examples have the score."""
    return f"{value}" if value.count == one.examples else f"{value} of {value.count}"


def _spelled(score: str) -> str:
    return score.replace("_", " ")


def title(results: "ResultFile") -> str:
    """Task and model."""
    return f"{results.heading['title']}, {results.heading['model']}"


def remarks(results: "ResultFile") -> list[str]:
    """What a reader of the table must know: `ResultFile.remarks`, why examples have no answer, and empty answers."""
    reasons: dict[str, list[str]] = {}
    empty: collections.Counter[str] = collections.Counter()
    for line in results.lines:
        if line.error is not None:
            reasons.setdefault(line.label, []).append(line.error)
        elif line.generated and not line.answer.strip():
            empty[line.label] += 1
    unanswered = [f"{label}: {len(own)} unanswered; the first: {own[0]}" for label, own in reasons.items()]
    silent = [f"{label}: {count} of the answers are empty" for label, count in empty.items()]
    return [printable(one) for one in (*results.remarks, *unanswered, *silent)]


def rich_table(results: "ResultFile", *, by_group: bool = False) -> "Table":
    """The table for a terminal."""
    headings, rows = _columns(results, by_group=by_group)
    return terminal.table(title(results), headings, rows)


def comparisons(results: "ResultFile", baseline: str, score: str) -> Compared:
    """Every method and budget against a baseline: "name" at the same budget or with none, "name@keep" at that one.

    Raises:
      UserError: no result is of the baseline.
    """
    contestants = list(dict.fromkeys(line.contestant for line in results.lines))
    name, at, keep = baseline.partition("@")
    if not any(one[0] == name and (not at or str(one[1]) == keep) for one in contestants):
        labels = ", ".join(result_file.label(*one) for one in contestants)
        raise UserError(f"--baseline={baseline}: the results are of {labels}")
    found: Compared = {}
    for contestant in contestants:
        against = [
            one
            for one in contestants
            if one[0] == name and str(one[1]) in ((keep,) if at else (str(contestant[1]), "all"))
        ]
        if not against or contestant == against[0]:
            continue
        for length in dict.fromkeys(line.length for line in results.lines):
            lines = [line for line in results.lines if line.length == length]
            own, other = (summary.scores_by_example(lines, one, score) for one in (contestant, against[0]))
            if (made := summary.compare(own, other)) is not None:
                found[(*contestant, length)] = made
    if not found:
        labels = ", ".join(result_file.label(*one) for one in contestants)
        raise UserError(f"--baseline={baseline}: no other method has scores at its budget; the results are of {labels}")
    return found


def _compared_columns(compared: Compared) -> tuple[list[str], list[list[str]]]:
    headings = ["method", "keep", "text tokens", "examples", "higher", "lower", "difference", "p"]
    rows = []
    for (method, keep, length), one in compared.items():
        cells = [method, f"{keep:,}" if isinstance(keep, int) else keep, "own" if length is None else f"{length:,}"]
        p = f"{one.p:.3f}" if one.p >= 0.001 else "< 0.001"
        rows.append([*cells, str(one.examples), str(one.better), str(one.worse), f"{one.difference:+.3f}", p])
    return headings, rows


def rich_comparison(compared: Compared, baseline: str, score: str) -> "Table":
    """The comparisons for a terminal."""
    return terminal.table(compared_title(score, baseline), *_compared_columns(compared))


def _reliability_columns(tenths: "Sequence[Tenth]") -> tuple[list[str], list[list[str]]]:
    rows = [[f"{one.stated:.2f}", f"{one.measured}", str(one.measured.count)] for one in tenths]
    return ["stated recall", "kept (95 %)", "examples"], rows


def rich_reliability(tenths: "Sequence[Tenth]") -> "Table":
    """The estimates of recall and what was kept, for a terminal."""
    return terminal.table(_RELIABILITY, *_reliability_columns(tenths))


def compared_title(score: str, baseline: str) -> str:
    """Which scores a table of comparisons is about."""
    return f"{_spelled(score)}, compared with {baseline}"


def markdown(
    results: "ResultFile", compared: Compared | None = None, caption: str = "", *, by_group: bool = False
) -> str:
    """The tables in Markdown, with captions; `caption` is that of the comparisons."""
    made = [_in_markdown(title(results)), _markdown(*_columns(results, by_group=by_group))]
    if compared:
        made += [_in_markdown(caption), _markdown(*_compared_columns(compared))]
    if tenths := summary.reliability(results.lines):
        made += [_RELIABILITY, _markdown(*_reliability_columns(tenths))]
    if told := remarks(results):
        made.append("\n".join(f"- {_in_markdown(one)}" for one in told))
    return "\n\n".join(made)


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(_in_markdown, line))} |" for line in lines)


def _in_markdown(text: str) -> str:
    """Text as text: nothing in it is markup."""
    return re.sub(r"[\\`*|\[\]]|<(?=[A-Za-z/!?])", r"\\\g<0>", printable(text))


def as_json(results: "ResultFile", compared: Compared | None = None, *, by_group: bool = False) -> dict[str, Any]:
    """The tables as JSON values, numbers not rounded."""
    made: dict[str, Any] = {
        "run": dict(results.heading),
        "remarks": remarks(results),
        "rows": [dataclasses.asdict(one) for one in summary.summarise(results.lines, by_group=by_group)],
    }
    if tenths := summary.reliability(results.lines):
        made["reliability"] = [dataclasses.asdict(one) for one in tenths]
    if compared is not None:
        made["compared"] = [
            {"method": method, "keep": keep, "length": length, **dataclasses.asdict(one)}
            for (method, keep, length), one in compared.items()
        ]
    return made


@contextlib.contextmanager
def running(console: "Console", lines: Sequence["Line"], total: int, score: str) -> Iterator[Callable[["Line"], None]]:
    """Progress with the running scores and the time left; lines of text now and then where there is no terminal.

    Args:
      lines: those that an earlier run has left. total: number of lines at the end.

    Yields:
      A function to call with each new line.
    """
    values: dict[str, list[float]] = {}
    start, told, left, done = time.monotonic(), time.monotonic(), len(lines), 0

    def count(line: "Line") -> None:
        if score in line.scores:
            values.setdefault(line.label, []).append(line.scores[score])

    def scores() -> str:
        return ", ".join(f"{name} {sum(own) / len(own):.2f}" for name, own in values.items())

    for line in lines:
        count(line)
    with terminal.counted(console, "asking", len(lines), total) as advance:

        def report(line: "Line") -> None:
            nonlocal done, told
            done += 1
            count(line)
            advance(f"{_spelled(score)}: {scores()}")
            now, finished = time.monotonic(), left + done
            if not console.is_terminal and now - told >= terminal.SECONDS_BETWEEN:
                told = now
                left_over = terminal.time_left((now - start) / done * (total - finished))
                terminal.remark(console, f"{finished} of {total}, {left_over}; {_spelled(score)}: {scores()}")

        yield report
