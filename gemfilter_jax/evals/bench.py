"""Time and memory of full attention and of GemFilter, measured side by side in one process."""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence

import jax

from gemfilter_jax.evals.tasks.needles import Needles
from gemfilter_jax.methods.base import Method
from gemfilter_jax.pipeline import Pipeline
from gemfilter_jax.timing import COMPILE

_CLEAR_PEAK = "5"  # written to clear_refs, this resets the peak resident set; see proc(5)


@dataclasses.dataclass(frozen=True)
class Row:
    """One method at one prompt length.

    Attributes:
      kept_tokens: of the prompt; where keys and values are evicted, those of each layer and key head.
      seconds: median over the repeats, by stage.
      total: median over the repeats of the sum of all stages but compilation.
      ratio: median over the repeats of full attention's total divided by this method's; None without full attention.
      peak_bytes: see `peak_memory`.
    """

    method: str
    prompt_tokens: int
    kept_tokens: int
    seconds: dict[str, float]
    total: float
    ratio: float | None
    peak_bytes: int


def environment() -> dict[str, str]:
    """The hardware and library versions that a result file must state."""
    return {
        "device": jax.devices()[0].device_kind,
        "devices": str(jax.device_count()),
        "backend": jax.default_backend(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "flax": importlib.metadata.version("flax"),
        "gemfilter_jax": importlib.metadata.version("gemfilter_jax"),
        "memory": "peak resident set of the process"
        if peaks_are_apart()
        else "peak bytes in use on the device, so far",
    }


def run(
    model: Pipeline, methods: Mapping[str, Method], lengths: Sequence[int], *, new_tokens: int, repeats: int
) -> Iterator[list[Row]]:
    """For each prompt length, the rows of all methods; ratios compare "full" with each method.

    Each method runs once to compile. Then all methods run in turn, `repeats` times, so that drift of the machine
    affects them equally. Answers do not stop early: every run generates `new_tokens` tokens.
    """
    endless = dataclasses.replace(model, checkpoint=dataclasses.replace(model.checkpoint, stop_tokens=()))
    for length in lengths:
        example = next(Needles(depths=(0.5,)).examples(model.checkpoint.tokenizer, length))
        runs: dict[str, list] = {name: [] for name in methods}
        peaks: dict[str, int] = {}
        for repeat in range(repeats + 1):
            for name, method in methods.items():
                _reset_peak()
                result = endless.generate(example.text, example.question, method=method, max_new_tokens=new_tokens)
                if repeat:
                    runs[name].append(result)
                    peaks[name] = max(peaks.get(name, 0), peak_memory())
        yield [_row(name, method, runs, peaks[name]) for name, method in methods.items()]


def _row(name: str, method: Method, runs: Mapping[str, list], peak: int) -> Row:
    results = runs[name]
    stages = [stage for stage in results[0].timings if stage != COMPILE]
    ratio = None
    if "full" in runs:
        ratio = statistics.median(_total(full) / _total(own) for full, own in zip(runs["full"], results, strict=True))
    return Row(
        method=name,
        prompt_tokens=results[0].selection.prompt_tokens,
        kept_tokens=min(results[0].selection.kept_tokens, method.budget or results[0].selection.prompt_tokens),
        seconds={stage: statistics.median(result.timings[stage] for result in results) for stage in stages},
        total=statistics.median(map(_total, results)),
        ratio=ratio,
        peak_bytes=peak,
    )


def _total(result) -> float:
    return sum(seconds for stage, seconds in result.timings.items() if stage != COMPILE)


def peak_memory() -> int:
    """Peak bytes: on CPU, the process's resident set since the last reset; on accelerators, device memory so far."""
    if peaks_are_apart():
        status = pathlib.Path("/proc/self/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def _reset_peak() -> None:
    if peaks_are_apart():
        pathlib.Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK)


def peaks_are_apart() -> bool:
    """Whether `peak_memory` is a run's own. Accelerators tell the highest peak so far, of all methods."""
    return jax.default_backend() == "cpu" and sys.platform == "linux"
