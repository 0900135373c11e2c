"""A plan as tables for a terminal."""

from typing import TYPE_CHECKING

from rich.console import Console

from gemfilter_jax.errors import printable
from gemfilter_jax.reporting import terminal

if TYPE_CHECKING:
    from gemfilter_jax.planning.chips import Topology
    from gemfilter_jax.planning.plan import Plan, Stage

_MEMORY = ("GB on one device", "weights", "arguments", "temporaries", "total", "of")
_WORK = ("one device", "TFLOP", "GB from memory", "GB exchanged", "seconds", "bound by")


def show(console: Console, model: str, plan: "Plan", larger: "Topology | None") -> None:
    """Print a plan and, if it does not fit, the smallest larger topology on which it does."""
    request = plan.request
    attention = "tri_shape" if request.is_tri_shape else "dense"
    layer, layers = request.method.filter_layer, request.config.layers
    terminal.remark(
        console,
        f"{printable(model)}, {request.tokens:,} tokens, keep {request.method.keep:,}, on {plan.topology} as "
        f"{plan.shape}, stage 2 as {plan.generating}; layer {layer} of {layers} picks, {attention} before it",
    )
    rows = []
    for name, stage in plan.stages.items():
        if stage.memory:
            memory = stage.memory
            parts = (memory.weights, memory.arguments, memory.temporaries, memory.total, plan.capacity)
            rows.append([name, *(f"{part / 1e9:,.2f}" for part in parts)])
    console.print(terminal.table("", _MEMORY, rows))
    rows = [_work(name, stage) for name, stage in plan.stages.items()]
    rows += [_work(f"full {name}", stage) for name, stage in plan.full_attention.items()]
    console.print(terminal.table("", _WORK, rows))
    for name, stage in plan.stages.items():
        for (kind, axis), one in stage.costs.exchanges.items():
            terminal.remark(console, f"{name}: {one.count:,} {kind} over {axis}, {one.bytes / 1e6:,.1f} MB")
    terminal.remark(console, f"decode: {plan.token_traffic / 1e9:,.2f} GB from memory for each token")
    for note in plan.notes:
        terminal.remark(console, f"note: {note}")
    terminal.remark(console, _verdict(plan, larger))


def _work(name: str, stage: "Stage") -> list[str]:
    seconds = [f"{stage.time.total:.3f}", stage.time.bound] if stage.time else ["-", "-"]
    counts = (stage.costs.flops / 1e12, stage.traffic / 1e9, stage.costs.exchanged / 1e9)
    return [name, *(f"{count:,.2f}" for count in counts), *seconds]


def _verdict(plan: "Plan", larger: "Topology | None") -> str:
    if plan.fits:
        return f"fits, {-plan.excess:,} bytes to spare on a device"
    missing = f"does not fit: {plan.excess:,} bytes too many on a device"
    return f"{missing}; {larger} fits" if larger else missing
