"""Plots, drawn by matplotlib if it is installed."""

import collections
import functools
import io
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ParamSpec

import numpy as np

from gemfilter_jax import files
from gemfilter_jax.errors import printable
from gemfilter_jax.evals import result_file, summary
from gemfilter_jax.reporting import bench_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gemfilter_jax.evals.bench import Row
    from gemfilter_jax.evals.calibration.calibrate import LayerRecall
    from gemfilter_jax.evals.result_file import ResultFile
    from gemfilter_jax.evals.summary import Tenth

_Arguments = ParamSpec("_Arguments")

_PANELS_A_ROW = 4
_OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999", "#F0E442")
_MARKERS = "osD^vPX<>*hd"
_LINES = ("-", "--", ":", "-.")


def _texts_as_they_are(draw: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Let a function draw dollar signs, where matplotlib would set a formula."""

    @functools.wraps(draw)
    def drawing(*args: _Arguments.args, **options: _Arguments.kwargs) -> None:
        import matplotlib

        with matplotlib.rc_context({"text.parse_math": False}):
            draw(*args, **options)

    return drawing


def recall(judged: "Sequence[LayerRecall]", path: str) -> None:
    """Plot the share of answers kept by layer: a line for each budget and ranking, 95 % intervals for learned heads."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    layers = [one.layer for one in judged]
    for index, budget in enumerate(one.keep for one in judged[0].learned):
        own = [one.learned[index] for one in judged]
        kept = [count / asked for count, asked in (one.counts for one in own)]
        (line,) = axes.plot(layers, kept, marker="o", label=f"learned heads and words, keep {budget}")
        low, high = zip(*(one.interval for one in own), strict=True)
        axes.fill_between(layers, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    last = judged[0].learned[-1].keep
    for style, label, ranked in (
        ("--", "all heads of the layer alike, and words", [one.alike[-1] for one in judged]),
        (":", "learned heads without words", [one.attention[-1] for one in judged]),
    ):
        counts = [one.counts for one in ranked]
        axes.plot(layers, [kept / asked for kept, asked in counts], style, label=f"{label}, keep {last}")
    axes.set(xlabel="filter layer", ylabel="share of answers kept", xticks=layers, ylim=(0, 1.03))
    axes.legend(loc="upper left")
    _write(figure, path)


@_texts_as_they_are
def reliability(results: "ResultFile", tenths: "Sequence[Tenth]", path: str) -> None:
    """Plot what was kept by the estimate of recall, with 95 % intervals, beside the line of honest estimates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot((0, 1), (0, 1), "--", color="grey", label="as stated")
    values = [one.measured.value for one in tenths]
    bounds = [one.measured.interval or (one.measured.value,) * 2 for one in tenths]
    errors = np.abs(np.transpose(bounds) - values)
    axes.errorbar([one.stated for one in tenths], values, errors, marker="o", capsize=2, label="measured")
    for one in tenths:
        at = (one.stated, one.measured.value)
        axes.annotate(str(one.measured.count), at, xytext=(6, -10), textcoords="offset points", fontsize=8)
    axes.set(xlabel="estimated recall", ylabel="share of answers kept", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.suptitle(f"{_title(results)}\n(numbers of examples, 95 % intervals)", fontsize=11)
    _write(figure, path)


@_texts_as_they_are
def heat_maps(results: "ResultFile", score: str, path: str) -> None:
    """Plot the mean score by length and part of the task, one panel for each method and budget, its mean in the title.

    Colours are those of viridis, which people with any form of colour vision tell apart; hatched cells were not
    asked, or have no answer.
    """
    from matplotlib.figure import Figure

    parts = list(dict.fromkeys(line.group for line in results.lines))
    lengths = list(dict.fromkeys(line.length for line in results.lines))
    contestants = list(dict.fromkeys(line.contestant for line in results.lines))
    budgets = max(collections.Counter(method for method, _ in contestants).values())
    columns = budgets if budgets > 1 else min(len(contestants), _PANELS_A_ROW)
    rows = len({method for method, _ in contestants}) if budgets > 1 else -(-len(contestants) // columns)
    size = (1.2 + columns * max(0.55 * len(lengths) + 0.9, 2.6), 0.9 + rows * (0.3 * len(parts) + 1.3))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    places = _places(contestants, columns) if budgets > 1 else range(len(contestants))
    hatched = False
    for index, contestant in zip(places, contestants, strict=True):
        own = [line for line in results.lines if line.contestant == contestant and score in line.scores]
        grid = np.full((len(parts), len(lengths)), np.nan)
        for row, part in enumerate(parts):
            for column, length in enumerate(lengths):
                cell = [line.scores[score] for line in own if (line.group, line.length) == (part, length)]
                if cell:
                    grid[row, column] = sum(cell) / len(cell)
        axes = panels[index // columns][index % columns]
        axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto", zorder=1)
        if np.isnan(grid).any():
            hatched = True
            axes.patch.set(facecolor="white", edgecolor="0.5", hatch="////")
        average = f"{sum(line.scores[score] for line in own) / len(own):.3f}" if own else "none"
        axes.set_title(f"{result_file.label(*contestant)}: {average}", fontsize=10)
        axes.set_xticks(range(len(lengths)), ["own" if one is None else f"{one:,}" for one in lengths], rotation=45)
        axes.set_yticks(range(len(parts)), [printable(part) or "all" for part in parts])
    for index, axes in enumerate(panels.flat):
        if index not in places:
            axes.set_axis_off()
            if index >= columns:
                panels.flat[index - columns].tick_params(labelbottom=True)
    figure.colorbar(panels[0][0].images[0], ax=panels, label=score.replace("_", " "), shrink=0.8)
    figure.suptitle(_title(results) + "\n(hatched: not asked, or no answer)" * hatched, fontsize=11)
    figure.supxlabel("text tokens", fontsize=10)
    figure.supylabel(results.heading["parts"], fontsize=10)
    _write(figure, path)


@_texts_as_they_are
def by_budget(results: "ResultFile", score: str, path: str) -> None:
    """Plot the mean score with its 95 % interval by budget, a line for each method and a panel for each length.

    Methods without a budget in tokens are horizontal lines, without an interval. Colours are Okabe and Ito's; markers
    differ as well.
    """
    from matplotlib.figure import Figure

    made = [one for one in summary.summarise(results.lines) if score in one.scores]
    lengths = list(dict.fromkeys(one.length for one in made))
    names = list(dict.fromkeys(one.method for one in made))
    budgets = sorted({one.keep for one in made if isinstance(one.keep, int)})
    figure = Figure(figsize=(1.6 + 3.6 * len(lengths), 4), layout="constrained")
    panels = figure.subplots(1, len(lengths), squeeze=False, sharey=True)[0]
    for axes, length in zip(panels, lengths, strict=True):
        for index, name in enumerate(names):
            own = [one for one in made if (one.method, one.length) == (name, length)]
            style = {"color": _OKABE_ITO[index % len(_OKABE_ITO)], "label": name}
            of_budgets = [(budgets.index(one.keep), one) for one in own if isinstance(one.keep, int)]
            counted = sorted(of_budgets, key=lambda pair: pair[0])
            if counted:
                means = [one.scores[score] for _, one in counted]
                places = [place + 0.06 * (index - (len(names) - 1) / 2) for place, _ in counted]
                bounds = [one.interval or (one.value, one.value) for one in means]
                values = [one.value for one in means]
                errors = np.abs(np.transpose(bounds) - values)
                marker = _MARKERS[index % len(_MARKERS)]
                axes.errorbar(places, values, errors, marker=marker, capsize=2, **style)
            for one in own:
                if not isinstance(one.keep, int):
                    axes.axhline(one.scores[score].value, linestyle="--", **style)
        axes.set_title("own lengths" if length is None else f"{length:,} tokens", fontsize=10)
        axes.set_xticks(range(len(budgets)), [f"{one:,}" for one in budgets])
        axes.set(xlabel="tokens kept", xlim=(-0.5, max(len(budgets), 1) - 0.5), ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(score.replace("_", " "))
    shown = {name: handle for axes in panels for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside right center", fontsize=9)
    examples = sorted({one.scores[score].count for one in made})
    counts = " to ".join(str(count) for count in dict.fromkeys((examples[0], examples[-1])))
    figure.suptitle(f"{_title(results)}\n({counts} examples, 95 % intervals)", fontsize=11)
    _write(figure, path)


@_texts_as_they_are
def time_and_memory(rows: "Sequence[Row]", title: str, path: str, *, memory: str) -> None:
    """Plot median seconds of all stages and memory by prompt length.

    There is a line for each method and filter attention, which have a colour and a marker, and for each batch size,
    which has a style of line.

    Args:
      title: what was measured, on which device.
      memory: what `Row.memory` is.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    values = {
        "seconds of all stages": lambda row: row.median["total_seconds"],
        f"{memory}, GB": lambda row: row.memory / 1e9,
    }
    panels = figure.subplots(1, len(values))
    tell_attention = bench_tables.attention_matters(rows)
    batches = list(dict.fromkeys(row.batch for row in rows))
    colours = list(dict.fromkeys((row.method, row.keep, row.filter_attention) for row in rows))
    for colour, batch in itertools.product(colours, batches):
        index, number, (method, keep, attention) = colours.index(colour), batches.index(batch), colour
        own = [row for row in rows if (row.method, row.keep, row.filter_attention, row.batch) == (*colour, batch)]
        own.sort(key=lambda row: row.prompt_tokens)
        style = {
            "color": _OKABE_ITO[index % len(_OKABE_ITO)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "linestyle": _LINES[number % len(_LINES)],
            "label": result_file.label(method, keep)
            + (f" {attention}" if tell_attention and attention else "")
            + (f", batch {batch}" if len(batches) > 1 else ""),
        }
        for axes, value in zip(panels, values.values(), strict=True):
            axes.plot([row.prompt_tokens for row in own], [value(row) for row in own], **style)
    for axes, label in zip(panels, values, strict=True):
        axes.set(xlabel="prompt tokens", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", fontsize=9, handlelength=4)  # so that dashes are seen
    figure.suptitle(printable(title), fontsize=11)
    _write(figure, path)


def _places(contestants: "Sequence[tuple[str, int | str]]", columns: int) -> list[int]:
    """A panel for each contestant: a row for each method, its budgets side by side."""
    rows: dict[str, int] = {}
    used: collections.Counter[str] = collections.Counter()
    places = []
    for method, _ in contestants:
        row = rows.setdefault(method, len(rows))
        places.append(row * columns + used[method])
        used[method] += 1
    return places


def _title(results: "ResultFile") -> str:
    return "\n".join(printable(results.heading[name]) for name in ("title", "model"))


def _write(figure: "Figure", path: str) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format=pathlib.Path(path).suffix[1:] or "png", dpi=130)
    files.write_whole(path, picture.getvalue())
