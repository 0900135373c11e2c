"""Terminal output: kept passages, the closing lines of a run, tables, progress."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from gemfilter_jax.errors import printable, visible

if TYPE_CHECKING:  # so that a command reports mistakes before it imports JAX
    from gemfilter_jax.checkpoints.weights import BytesRead
    from gemfilter_jax.methods.base import Progress as TokensRead
    from gemfilter_jax.results import KeptText

SECONDS_BETWEEN = 30  # of the lines that tell of progress where there is no terminal

_UNSURE = 0.5  # an estimate of recall below it is warned of
_WIDEST = 1_000  # characters of a line in a file
_CONTEXT = 60  # characters shown, dimmed, on both sides of a kept passage


def show_kept(console: Console, kept: "KeptText") -> None:
    """Print each kept passage highlighted, with its character offsets and a little of the text around it."""
    for start, end in kept.spans:
        line = Text(f"[{start:,}-{end:,}] ", style="cyan")
        line.append(_one_line(kept.prompt[max(start - _CONTEXT, 0) : start]), style="dim")
        line.append(_one_line(kept.prompt[start:end]), style="bold black on yellow")
        line.append(_one_line(kept.prompt[end : end + _CONTEXT]), style="dim")
        console.print(line, soft_wrap=not console.is_terminal)


def writer(lead: str = "") -> Callable[[str], None]:
    """A function that prints the pieces of an answer as they come, with `lead` before the first."""
    leads = iter([lead])
    return lambda piece: write(next(leads, "") + piece, end="")


def write(text: str, end: str = "\n") -> None:
    """Print text on standard output at once; a terminal shows control characters, and does not obey them."""
    print(visible(text) if sys.stdout.isatty() else text, end=end, flush=True)


def _one_line(text: str) -> str:
    return " ".join(visible(text).split("\n"))


def closing_lines(kept: "KeptText", layers: str, timings: Mapping[str, float]) -> str:
    """Tokens read and kept, layers run, estimated recall, seconds per stage: two lines, and a warning if need be."""
    share = kept.kept_tokens / kept.prompt_tokens
    lines = [f"read {kept.prompt_tokens:,} tokens, kept {kept.kept_tokens:,} (ratio {share:.4f}), {layers}"]
    recall = kept.recall_estimate
    if recall is not None:
        lines[0] += f", recall about {recall:.2f}"
    lines.append(", ".join(f"{stage} {value:.2f} s" for stage, value in timings.items()))
    if recall is not None and recall < _UNSURE:
        lines.append("warning: the answer is probably not in what was kept; keep more, see --keep")
    return "\n".join(lines)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    made = Table(title=Text(printable(title)), title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(Text(printable(column)), justify="left" if index == 0 else "right")
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    return made


def print_table(made: Table) -> None:
    """Print a table on standard output, in a file as wide as it is."""
    console = Console()
    (console if console.is_terminal else Console(width=_WIDEST)).print(made)


@contextlib.contextmanager
def _bar(console: Console, *columns: ProgressColumn) -> Iterator[Progress]:
    """A progress bar on a terminal, removed at the end; nothing elsewhere. Standard output is not redirected."""
    bar = Progress(*columns, console=console, transient=True, redirect_stdout=False, disable=not console.is_terminal)
    with bar:
        yield bar


def status(console: Console, doing: str) -> contextlib.AbstractContextManager[object]:
    """A spinner on a terminal; nothing elsewhere."""
    return console.status(doing) if console.is_terminal else contextlib.nullcontext()


@contextlib.contextmanager
def reading_progress(console: Console) -> Iterator["TokensRead"]:
    """A progress bar of the tokens read by stage 1, removed when all are read so that the answer can be streamed."""
    columns = (
        TextColumn("reading"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with contextlib.ExitStack() as shown:
        bars: list[tuple[Progress, TaskID]] = []

        def report(read: int, total: int) -> None:
            if not bars:
                bar = shown.enter_context(_bar(console, *columns))
                bars.append((bar, bar.add_task("reading", total=total)))
            bar, task = bars[0]
            bar.update(task, completed=read, total=total)
            if read == total:
                shown.close()

        yield report


@contextlib.contextmanager
def counted(console: Console, doing: str, done: int, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar that each call moves on by one, with a remark below it; removed at the end."""
    columns = (
        TextColumn(doing),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with _bar(console, *columns) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda remark: bar.update(task, advance=1, description=remark)


@contextlib.contextmanager
def loading_progress(console: Console) -> Iterator["BytesRead"]:
    """A progress bar of the bytes of weights read, removed at the end."""
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with _bar(console, *columns) as bar:
        task = bar.add_task("loading", total=None, visible=False)
        yield lambda read, total: bar.update(task, completed=read, total=total, visible=True)


@contextlib.contextmanager
def stages_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each stage of a long run, updated with (stage, done, total) and removed at the end.

    Without a terminal, a line now and then.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with _bar(console, *columns) as bar:
        tasks: dict[str, TaskID] = {}
        begun: dict[str, float] = {}
        told = time.monotonic()

        def report(stage: str, done: int, total: int) -> None:
            nonlocal told
            now = time.monotonic()
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
                begun[stage] = now  # the first item, which may compile, is done by then
            bar.update(tasks[stage], completed=done)
            if not console.is_terminal and 1 < done < total and now - told >= SECONDS_BETWEEN:
                told = now
                left = time_left((now - begun[stage]) / (done - 1) * (total - done))
                remark(console, f"{stage}: {done} of {total}, {left}")

        yield report


def time_left(seconds: float) -> str:
    """The time that a run still takes, in words."""
    minutes = seconds / 60
    return f"{minutes:.0f} minutes left" if minutes >= 1.5 else "about a minute left or less"


def remark(console: Console, text: str) -> None:
    """Print a line of text as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
