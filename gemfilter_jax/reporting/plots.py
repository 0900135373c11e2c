"""Plots, drawn by matplotlib if it is installed."""

import importlib.util
import io
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gemfilter_jax import files
from gemfilter_jax.errors import UserError

if TYPE_CHECKING:
    from gemfilter_jax.evals.calibration import LayerRecall


def check_installed() -> None:
    """Raise a `UserError` if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot: needs matplotlib; install it with pip install matplotlib, or leave the flag out")


def recall(judged: "Sequence[LayerRecall]", target: float, path: str) -> None:
    """Plot the share of facts kept by layer: a line for each budget and head set, 95 % intervals for learned heads."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    layers = [one.layer for one in judged]
    for index, budget in enumerate(one.keep for one in judged[0].learned):
        own = [one.learned[index] for one in judged]
        (line,) = axes.plot(layers, [one.share for one in own], marker="o", label=f"learned heads, keep {budget}")
        low, high = zip(*(one.interval for one in own), strict=True)
        axes.fill_between(layers, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    last = judged[0].learned[-1].keep
    axes.plot(layers, [one.alike[-1].share for one in judged], "--", label=f"all heads alike, keep {last}")
    axes.plot(layers, [one.up_to[-1].share for one in judged], ":", label=f"heads of all layers up to it, keep {last}")
    axes.axhline(target, color="grey", linewidth=0.8)
    axes.set(xlabel="filter layer", ylabel="share of facts kept", xticks=layers, ylim=(0, 1.03))
    axes.legend(loc="upper left")
    picture = io.BytesIO()
    figure.savefig(picture, format=pathlib.Path(path).suffix[1:] or "png", dpi=130)
    files.write_whole(path, picture.getvalue())
