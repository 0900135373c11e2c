"""Time and memory of methods, measured side by side in one process, beside the ceilings of the device."""

import dataclasses
import importlib.metadata
import itertools
import math
import os
import pathlib
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gemfilter_jax import calls
from gemfilter_jax.calls import Call
from gemfilter_jax.checkpoints.weights import Loading, abstract_decoder
from gemfilter_jax.errors import UserError
from gemfilter_jax.evals.example import Example
from gemfilter_jax.evals.runner import Contestant
from gemfilter_jax.evals.tasks.needles import Needles
from gemfilter_jax.generate import loop
from gemfilter_jax.methods.gemfilter import scoring_pass
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.models.transformer import Decoder
from gemfilter_jax.pipeline import Pipeline
from gemfilter_jax.planning import programs
from gemfilter_jax.planning.ceilings import Ceilings
from gemfilter_jax.planning.costs import Costs
from gemfilter_jax.results import Result
from gemfilter_jax.timing import COMPILE

_PROCESS = pathlib.Path("/proc/self")  # see proc(5)
_CLEAR_PEAK = "5"  # written to clear_refs, this resets the peak resident set
_PEAK = "VmHWM"
_STAGES = ("tokenize", "filter", "prefill", "decode")

Measures = dict[str, float]
"""What is known of one run, by name, see `_measures`; measures that a method does not have are left out."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What one run computes and reads on one device.

    Attributes:
      filter_flops, prefill_flops: FLOPs of matrix products; None where they could not be counted.
      filter_int8_flops, prefill_int8_flops: those among them in int8.
      decode_step_bytes: size of the weights and of the KV cache as allocated, which one decode step reads.
      largest_program_bytes: size of weights, arguments, results and temporaries of the program that needs most, by the
        compiler's report.
    """

    filter_flops: int | None
    filter_int8_flops: int | None
    prefill_flops: int | None
    prefill_int8_flops: int | None
    decode_step_bytes: int
    largest_program_bytes: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One method for prompts of one length, several at a time.

    Attributes:
      method, keep: as results name them, see `Contestant`.
      filter_attention: the method's setting; None for methods other than GemFilter.
      batch: prompts at a time.
      prompt_tokens: of the longest prompt. kept_tokens: of that prompt; where keys and values are evicted, those of
        each layer and key head.
      compile_seconds: of the run before those that are timed.
      runs: measures of every timed run.
      median, least, most: over the runs, of each measure.
      peak_bytes: the highest `peak_memory` of the runs.
      shares: of the ceilings, which the median filter, prefill and decode step reach; None where there is no such
        stage or its work is not known.
    """

    method: str
    keep: int | str
    filter_attention: str | None
    batch: int
    prompt_tokens: int
    kept_tokens: int
    compile_seconds: float
    runs: tuple[Measures, ...]
    median: Measures
    least: Measures
    most: Measures
    peak_bytes: int
    work: Work
    shares: dict[str, float | None]

    @property
    def memory(self) -> int:
        """Bytes that this row alone needed: its peak where that is its own, else those of its largest program."""
        return self.peak_bytes if peaks_are_apart() else self.work.largest_program_bytes


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
        else "peak bytes in use on the device, so far; 0 where that is not known",
    }


def shape(model: Decoder) -> dict[str, int]:
    """Sizes of a model, for a result file."""
    config, names = model.config, ("layers", "width", "heads", "kv_heads", "head_width", "mlp_width", "vocab")
    parameters = jax.tree.leaves(abstract_decoder(config, Loading(jnp.dtype("float32"))))  # without scales of int8
    return {name: getattr(config, name) for name in names} | {
        "context": config.context,
        "parameters": sum(math.prod(leaf.shape) for leaf in parameters),
        "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model)),
    }


def run(
    model: Pipeline,
    contestants: Sequence[Contestant],
    lengths: Sequence[int],
    *,
    batches: Sequence[int],
    new_tokens: int,
    repeats: int,
    ceilings: Ceilings,
) -> Iterator[list[Row]]:
    """For each prompt length and batch size, the rows of all methods; ratios compare "full" with each method.

    A batch holds the same prompt several times. Each method runs once to compile. Then all methods run in turn,
    `repeats` times, so that drift of the machine affects them equally. Answers do not stop early: every run generates
    `new_tokens` tokens.

    Raises:
      UserError: a method cannot serve one of the prompts; told before any run.
    """
    endless = dataclasses.replace(model, checkpoint=dataclasses.replace(model.checkpoint, stop_tokens=()))
    examples = {length: _example(model, length) for length in lengths}
    for example, one in itertools.product(examples.values(), contestants):
        endless.check_prompt(example.text, example.question, one.method, new_tokens)
    for length in lengths:
        for batch in batches:
            yield _rows(endless, contestants, examples[length], batch, new_tokens, repeats, ceilings)


def _example(model: Pipeline, length: int) -> Example:
    return next(Needles(depths=(0.5,)).examples(model.checkpoint.tokenizer, length))


def _rows(
    model: Pipeline,
    contestants: Sequence[Contestant],
    example: Example,
    batch: int,
    new_tokens: int,
    repeats: int,
    ceilings: Ceilings,
) -> list[Row]:
    def answer(one: Contestant) -> Result:
        texts, questions = [example.text] * batch, [example.question] * batch
        return model.generate_batch(texts, questions, method=one.method, max_new_tokens=new_tokens)[0]

    warm: list[Result] = []
    made: list[list[Call]] = []
    for one in contestants:
        with calls.recorded() as called:
            warm.append(answer(one))
        made.append(called)
    timings: list[list[Mapping[str, float]]] = [[] for _ in contestants]
    peaks = [0] * len(contestants)
    for _ in range(repeats):
        for index, one in enumerate(contestants):
            _reset_peak()
            timings[index].append(answer(one).timings)
            peaks[index] = max(peaks[index], peak_memory())
    full = next((of_runs for one, of_runs in zip(contestants, timings, strict=True) if one.name == "full"), None)
    rows = []
    for index, one in enumerate(contestants):
        measures = [_measures(of_run, batch, new_tokens) for of_run in timings[index]]
        if full is not None:
            for own, of_full in zip(measures, full, strict=True):
                own["full_to_this_ratio"] = _total(of_full) / own["total_seconds"]
        rows.append(_row(one, batch, warm[index], measures, peaks[index], _work(made[index]), ceilings))
    return rows


def _measures(timings: Mapping[str, float], batch: int, new_tokens: int) -> Measures:
    """Seconds of a run by stage without compilation, and what follows from them.

    A decode step draws a token for each prompt; the prefill draws the first.
    """
    stages = {stage: timings[stage] for stage in _STAGES if stage in timings}
    made = {f"{stage}_seconds": seconds for stage, seconds in stages.items()}
    made["first_token_seconds"] = _total(timings) - stages["decode"]
    if new_tokens > 1:
        made["decode_step_seconds"] = stages["decode"] / (new_tokens - 1)
    made["total_seconds"] = _total(timings)
    made["tokens_per_second"] = batch * new_tokens / made["total_seconds"]
    return made


def _total(timings: Mapping[str, float]) -> float:
    return sum(seconds for stage, seconds in timings.items() if stage != COMPILE)


def _row(
    one: Contestant, batch: int, warm: Result, runs: list[Measures], peak: int, work: Work, ceilings: Ceilings
) -> Row:
    def over_runs(function: Any) -> Measures:
        return {name: function([measures[name] for measures in runs]) for name in runs[0]}

    median, kept = over_runs(statistics.median), warm.selection
    return Row(
        method=one.name,
        keep=one.keep,
        filter_attention=one.method.filter_attention if isinstance(one.method, GemFilter) else None,
        batch=batch,
        prompt_tokens=kept.prompt_tokens,
        kept_tokens=min(kept.kept_tokens, one.method.budget or kept.prompt_tokens),
        compile_seconds=warm.timings[COMPILE],
        runs=tuple(runs),
        median=median,
        least=over_runs(min),
        most=over_runs(max),
        peak_bytes=peak,
        work=work,
        shares=_shares(median, work, ceilings),
    )


def _shares(median: Measures, work: Work, ceilings: Ceilings) -> dict[str, float | None]:
    def of_products(flops: int | None, int8_flops: int | None, seconds: float | None) -> float | None:
        return ceilings.seconds(flops, int8_flops or 0) / seconds if flops and seconds else None

    step = median.get("decode_step_seconds")
    read = work.decode_step_bytes / ceilings.copy_bytes_per_second
    return {
        "filter": of_products(work.filter_flops, work.filter_int8_flops, median.get("filter_seconds")),
        "prefill": of_products(work.prefill_flops, work.prefill_int8_flops, median["prefill_seconds"]),
        "decode": read / step if step else None,
    }


def _work(called: Sequence[Call]) -> Work:
    """The work of the programs that a run called."""
    filtering = _costs(call for call in called if call.function is scoring_pass.score_prompt)
    prefill = _costs(call for call in called if call.function is loop.prefill)
    ((model, state),) = (call.arguments for call in called if call.function is loop.decode)
    read_whole = (model.layers, model.final_norm, model.embedding if model.lm_head is None else model.lm_head)
    return Work(
        filter_flops=filtering and filtering.flops,
        filter_int8_flops=filtering and filtering.int8_flops,
        prefill_flops=prefill and prefill.flops,
        prefill_int8_flops=prefill and prefill.int8_flops,
        decode_step_bytes=programs.bytes_on_device((read_whole, state.cache.keys, state.cache.values)),
        largest_program_bytes=max(map(_program_bytes, called)),
    )


def _costs(called: Iterator[Call]) -> Costs | None:
    """The costs of some programs together; None where one has loops that cannot be counted."""
    try:
        return sum((programs.of_call(call).costs() for call in called), Costs())
    except UserError:
        return None


def _program_bytes(call: Call) -> int:
    """Bytes on one device while a program runs that has been compiled before."""
    report: Any = call.function.lower(*call.arguments, **call.options).compile().memory_analysis()
    results = report.output_size_in_bytes - report.alias_size_in_bytes
    temporaries = report.temp_size_in_bytes + report.generated_code_size_in_bytes
    return programs.bytes_on_device((call.arguments, call.options)) + results + temporaries


def peak_memory() -> int:
    """Peak bytes: of the process's resident set since the last reset where `peaks_are_apart`; else of device memory so
    far, 0 where that is not known, as on CPU.
    """
    if peaks_are_apart():
        status = (_PROCESS / "status").read_text()
        line = next(line for line in status.splitlines() if line.startswith(_PEAK))
        return int(line.split()[1]) * 1024
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def _reset_peak() -> None:
    if peaks_are_apart():
        (_PROCESS / "clear_refs").write_text(_CLEAR_PEAK)


def memory_shown() -> str:
    """What `Row.memory` is."""
    return "peak memory" if peaks_are_apart() else "memory of the largest program"


def peaks_are_apart() -> bool:
    """Whether `peak_memory` is a run's own: on CPU, where Linux tells the peak and lets it be reset; gVisor does not.

    Accelerators tell the highest peak so far, of all methods.
    """
    if jax.default_backend() != "cpu" or not os.access(_PROCESS / "clear_refs", os.W_OK):
        return False
    return _PEAK in (_PROCESS / "status").read_text()
