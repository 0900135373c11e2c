"""Flags that several commands share, and what is made of them."""

import contextlib
import importlib.util
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from gemfilter_jax import files, methods
from gemfilter_jax.errors import UserError, printable
from gemfilter_jax.methods.base import Method
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.parallel import processes
from gemfilter_jax.settings import LARGEST_COUNT, Option

if TYPE_CHECKING:  # commands parse their flags before they import JAX, so that a mistake is told at once
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from gemfilter_jax.checkpoints import Opened
    from gemfilter_jax.config import ModelConfig
    from gemfilter_jax.evals.runner import Contestant
    from gemfilter_jax.methods.presets import Preset
    from gemfilter_jax.pipeline import Pipeline
    from gemfilter_jax.results import KeptText, Result

LONGEST_TEXT = 1 << 24  # tokens that texts are made of for comparisons, and plans are made for

_PLOTS = (".png", ".svg", ".pdf")
_COMPARED = ("full", "default", "paper")
_FILTER_OPTIONS = ("recall", "filter_layer", "lexical", "filter_attention", "filter_precision", "band", "first_tokens")


def define_weights(values: flags.FlagValues) -> None:
    """Define --model, --dtype and --weights."""
    flags.DEFINE_string(
        "model", "smollm2", "Model: a folder, a .gguf file, a Hugging Face hub id, or smollm2.", flag_values=values
    )
    flags.DEFINE_enum(
        "dtype",
        "auto",
        ["auto", "float32", "bfloat16"],
        "Type of weights and activations. auto: bfloat16 on accelerators, float32 on CPU.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "weights",
        "float",
        ["float", "int8"],
        "Storage of weight matrices. int8 takes about half the memory of bfloat16.",
        flag_values=values,
    )


def define_model(values: flags.FlagValues) -> None:
    """Define --model and the flags for loading and prompting the model."""
    define_weights(values)
    flags.DEFINE_bool("chat_template", True, "Wrap prompts in the model's chat template.", flag_values=values)
    flags.DEFINE_string(
        "message_format",
        None,
        "Message made of text and question: {text} once, then {question}; {question} may also come before.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "attention",
        "auto",
        ["auto", "xla", "splash", "cudnn", "pallas"],
        "Implementation of prompt attention: xla on any device, splash on TPU, cudnn and pallas on GPU. auto: splash, "
        "or cudnn and then pallas, where they support the call, else xla.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "mesh",
        "auto",
        "Device mesh, as data:N,seq:N,model:N: shards of the batch, of long prompts, and of the model's heads and MLP, "
        "which seq shards too while an answer is generated. "
        "auto: all devices, the fewest of them for the model that can hold it.",
        flag_values=values,
    )


def define_distributed(values: flags.FlagValues) -> None:
    """Define the flags that make several processes one run; `command.run` joins the processes."""
    flags.DEFINE_bool(
        "distributed",
        False,
        "Run as one of several processes, configured by the environment (TPU VM pods, Slurm, Open MPI, Kubernetes).",
        flag_values=values,
    )
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT where the first of several processes listens.", flag_values=values
    )
    flags.DEFINE_integer("processes", None, "Number of processes.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process", None, "Number of this process, counted from 0.", lower_bound=0, flag_values=values)


def joined(values: flags.FlagValues) -> contextlib.AbstractContextManager[None]:
    """Join the run that the flags of `define_distributed` describe; do nothing without these flags.

    Raises:
      UserError: the flags are incomplete or contradict each other.
    """
    names = ("coordinator", "processes", "process")
    given: dict[str, Any] = {name: values[name].value for name in names if name in values}
    given = {name: value for name, value in given.items() if value is not None}
    if "distributed" in values and values.distributed:
        if given:
            raise UserError(f"--{next(iter(given))}: --distributed takes it from the environment; give one of the two")
        return processes.joined()
    if not given:
        return contextlib.nullcontext()
    if missing := [name for name in names if name not in given]:
        raise UserError(f"--{missing[0]} is missing; --coordinator, --processes and --process go together")
    coordinator, count, number = (given[name] for name in names)
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise UserError(f"--coordinator={coordinator}: expected HOST:PORT, such as 10.0.0.1:1234")
    if number >= count:
        raise UserError(f"--process={number}: of {count} expected 0 to {count - 1}, counted from 0")
    return processes.joined(coordinator, count, number)


def define_filter(values: flags.FlagValues, *, budgets: bool = False) -> None:
    """Define --preset, --keep, --filter_layer, and the flags for the layers below the filter layer.

    Args:
      budgets: whether --keep takes several, separated by commas.
    """
    flags.DEFINE_string(
        "preset", None, "JSON file with the model's filter settings. Default: built in.", flag_values=values
    )
    flags.DEFINE_string(
        "keep",
        None,
        "Tokens to keep. auto: as many as hold the answer with the probability of --recall, at most the preset's "
        "number. "
        + ("Several, separated by commas, are compared. " if budgets else "")
        + "Default: the preset's choice.",
        flag_values=values,
    )
    flags.register_validator(
        "keep",
        lambda keep: (
            keep is None or all(one == "auto" or _is_count(one) for one in (keep.split(",") if budgets else [keep]))
        ),
        message="expected auto or a whole number of at least 1" + (", or several with commas" if budgets else ""),
        flag_values=values,
    )
    define_options(values, _FILTER_OPTIONS)


def _is_count(text: str) -> bool:
    """Whether a text is a whole number of at least 1, of a size that programs can count to."""
    return text.isdecimal() and len(text) <= len(str(LARGEST_COUNT)) and 1 <= int(text) <= LARGEST_COUNT


def define_options(values: flags.FlagValues, names: "Sequence[str]", **defaults: str) -> None:
    """Define flags for some options of GemFilter; options without a default here take the preset's value."""
    own = {one.name: one for one in GemFilter.options()}
    for name in names:
        define_option(values, own[name], defaults.get(name), "" if name in defaults else " Default: the preset's.")


def define_option(values: flags.FlagValues, one: Option, default: Any, ending: str = "") -> None:
    """Define a flag for an option; `ending` is appended to its help."""
    told = f"{one.help}{ending}"
    if one.choices:
        flags.DEFINE_enum(one.name, default, list(one.choices), told, flag_values=values)
    elif one.kind is bool:
        flags.DEFINE_bool(one.name, default, told, flag_values=values)
    elif one.kind is str:
        flags.DEFINE_string(one.name, default, told, flag_values=values)
    else:
        define: Any = flags.DEFINE_integer if one.kind is int else flags.DEFINE_float
        define(one.name, default, told, lower_bound=one.at_least, upper_bound=one.at_most, flag_values=values)


def define_rule(values: flags.FlagValues) -> None:
    """Define --rule."""
    flags.DEFINE_enum(
        "rule", "default", ["default", "paper"], "Selection rule: this project's, or the paper's.", flag_values=values
    )


def define_prompt_file(values: flags.FlagValues, otherwise: str) -> None:
    """Define --prompt_file; `otherwise` is help for runs without it."""
    flags.DEFINE_string("prompt_file", None, f"File with the long text. {otherwise}", flag_values=values)


def define_kept_text(values: flags.FlagValues) -> None:
    """Define --format and --report."""
    flags.DEFINE_enum("format", "text", ["text", "json"], "Output format.", flag_values=values)
    flags.DEFINE_string(
        "report", None, "Write an HTML page with the kept passages highlighted to this file.", flag_values=values
    )


def define_answer(values: flags.FlagValues) -> None:
    """Define the flags for generating answers, and --show_kept."""
    flags.DEFINE_integer("max_new_tokens", 128, "Longest answer, in tokens.", lower_bound=1, flag_values=values)
    flags.DEFINE_float(
        "temperature",
        0.0,
        "Sampling temperature; 0 always takes the likeliest token.",
        lower_bound=0.0,
        upper_bound=1e6,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "top_k", 0, "Sample among this many likeliest tokens; 0 for all.", lower_bound=0, flag_values=values
    )
    flags.DEFINE_float(
        "top_p",
        1.0,
        "Sample among the fewest tokens whose probabilities add up to this.",
        lower_bound=0.0,
        upper_bound=1.0,
        flag_values=values,
    )
    flags.DEFINE_integer("seed", 0, "Sampling seed.", lower_bound=0, upper_bound=2**32 - 1, flag_values=values)
    flags.DEFINE_bool("show_kept", False, "Show the kept passages, highlighted, on standard error.", flag_values=values)


def define_document_cache(values: flags.FlagValues) -> None:
    """Define --document_cache."""
    flags.DEFINE_string(
        "document_cache",
        None,
        "Folder for what was read of the text, so that later runs need not read it again.",
        flag_values=values,
    )


def check_document_cache(values: flags.FlagValues) -> None:
    """Raise a `UserError` if what is read of a text cannot be kept in --document_cache."""
    if values.document_cache is not None:
        files.check_folder(values.document_cache, "document_cache")


def answer_settings(values: flags.FlagValues) -> dict[str, Any]:
    """The flags of `define_answer` as arguments of `Pipeline.generate`."""
    from gemfilter_jax.generate.sampling import Sampling

    sampling = Sampling(values.temperature, values.top_k, values.top_p)
    return {"max_new_tokens": values.max_new_tokens, "sampling": sampling, "seed": values.seed}


def define_comparison(values: flags.FlagValues, lengths: list[str]) -> None:
    """Define --method, the options of methods, and --lengths, for commands that compare methods."""
    told = "; ".join(f"{name}: {one.variants[name]}" for name, one in methods.VARIANTS.items())
    flags.DEFINE_multi_string(
        "method",
        list(_COMPARED),
        f"Methods to compare, separated by commas; may be given several times. {told}.",
        flag_values=values,
    )
    flags.register_validator(
        "method",
        lambda given: all(name in methods.VARIANTS for name in _separated(given)),
        message=f"expected names among {', '.join(methods.VARIANTS)}",
        flag_values=values,
    )
    _define_options_of_methods(values)
    flags.DEFINE_list("lengths", lengths, "Lengths of the texts in tokens, separated by commas.", flag_values=values)


def _separated(given: "Sequence[str]") -> list[str]:
    """Names in lists with commas, each once."""
    return list(dict.fromkeys(name for names in given for name in names.split(",")))


def method_names(values: flags.FlagValues) -> list[str]:
    """The names in --method, each once."""
    return _separated(values.method)


def _define_options_of_methods(values: flags.FlagValues) -> None:
    """Define a flag for each option of the methods that has none yet; methods may share option names."""
    owners: dict[str, list[type[Method]]] = {}
    for method in methods.METHODS:
        for one in method.options():
            if one.name not in values and not one.several and one.stored:
                owners.setdefault(one.name, []).append(method)
    for name, having in owners.items():
        if having == [GemFilter]:
            continue
        own = next(one for one in having[-1].options() if one.name == name)
        named = ", ".join(variant for method in having for variant in method.variants)
        define_option(values, own, None, f" Of {named}. Default: the method's own, or the preset's.")


def read_prompt(values: flags.FlagValues) -> str:
    """The prompt's text.

    Raises:
      UserError: the prompt is missing, empty, or not UTF-8.
    """
    if values.prompt_file is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise UserError("no prompt; give --prompt_file=FILE or send text to standard input")
        name = "standard input"
        text = files.read_stream(sys.stdin.buffer, name)
    else:
        name = f"--prompt_file={values.prompt_file}"
        text = files.read_text(pathlib.Path(values.prompt_file), name)
    if not text.strip():
        raise UserError(f"{name}: the prompt is empty; give some text")
    return text


def console() -> "Console":
    """The console of standard error, for progress; silent in all but the first of several processes."""
    from rich.console import Console

    return Console(stderr=True, quiet=not processes.is_first())


def load_pipeline(
    values: flags.FlagValues,
    *,
    opened: "Opened | None" = None,
    layers: "Callable[[Preset, ModelConfig], int] | None" = None,
    many_prompts: bool = False,
) -> "Pipeline":
    """Load --model onto --mesh.

    Args:
      opened: a model to load in its place; None for --model.
      layers: gives the number of first layers to load, without an LM head; None for the whole model.
      many_prompts: prefer sharding the batch to sharding prompts.
    """
    from gemfilter_jax import checkpoints, pipeline
    from gemfilter_jax.methods import presets
    from gemfilter_jax.reporting import terminal
    from gemfilter_jax.text import prompt

    opened = checkpoints.open_checkpoint(values.model) if opened is None else opened
    if "preset" in values and values.preset is not None:
        preset = presets.read_preset(pathlib.Path(values.preset), opened.config)
    else:
        preset = presets.preset_for(opened.config)
    filter_layers = min(layers(preset, opened.config), opened.config.layers) if layers else None
    with terminal.loading_progress(console()) as progress:
        return pipeline.load(
            opened,
            dtype=values.dtype,
            weights=values.weights,
            filter_layers=filter_layers,
            mesh=values.mesh,
            many_prompts=many_prompts,
            preset=preset,
            chat_template=values.chat_template,
            message_format=prompt.MESSAGE_FORMAT if values.message_format is None else values.message_format,
            attention=None if values.attention == "auto" else values.attention,
            progress=progress,
        )


def chosen_method(values: flags.FlagValues, model: "Pipeline") -> Method:
    """The method of --rule with the given flags over the model's preset; prints a note if the model has no preset."""
    if model.preset.name == "none" and values.filter_layer is None and processes.is_first():
        print(printable(model.preset.source), file=sys.stderr)
    method = methods.make(values.rule, model.preset, **_given(values) | _budget(values.keep))
    method.check(model.checkpoint.model)
    return method


def _given(values: flags.FlagValues) -> dict[str, Any]:
    """The options of methods that were given as flags, but for the budget."""
    names = set[str]().union(*map(_names, methods.METHODS)) - {"keep"}
    return {name: values[name].value for name in names if name in values and values[name].value is not None}


def _budget(keep: str | None) -> dict[str, int | str]:
    """--keep as an option of a method; empty if it was not given."""
    return {} if keep is None else {"keep": keep if keep == "auto" else int(keep)}


def lengths(values: flags.FlagValues) -> list[int]:
    """--lengths as numbers."""
    return counts(values, "lengths", LONGEST_TEXT, "tokens")


def counts(values: flags.FlagValues, name: str, most: int, unit: str) -> list[int]:
    """A list of numbers from 1 to `most` that a flag gives, each once."""
    given: list[str] = values[name].value or []
    for one in given:
        if not _is_count(one):
            raise UserError(f"--{name}={','.join(given)}: {one!r} is not a whole number of at least 1")
        if int(one) > most:
            raise UserError(f"--{name}={','.join(given)}: {one} is beyond {most:,} {unit}")
    if not given:
        raise UserError(f"--{name} is empty; give one number or several, separated by commas")
    return list(dict.fromkeys(map(int, given)))


def check_methods(values: flags.FlagValues) -> None:
    """Raise a `UserError` if a given flag is an option of none of the methods of --method."""
    names = method_names(values)
    known = set[str]().union(*(_names(methods.VARIANTS[name]) for name in names))
    if strangers := sorted({*_given(values), *_budget(values.keep and "1")} - known):
        others = [name for name in methods.VARIANTS if strangers[0] in _names(methods.VARIANTS[name])]
        raise UserError(f"--{strangers[0]} means nothing to --method={','.join(names)}; it is for {others[0]}")


def check_plots(values: flags.FlagValues, *names: str) -> None:
    """Raise a `UserError` if a plot cannot be drawn, or written to the file that one of these flags names."""
    taken: dict[pathlib.Path, str] = {}
    for name in (*names, "output"):
        path = values[name].value if name in values else None
        if not path:
            continue
        other = taken.setdefault(pathlib.Path(path).resolve(), name)
        if other != name:
            raise UserError(f"--{other} and --{name} are both {path}; give two files")
        if name in names:
            files.check_writable(path, name)
            if pathlib.Path(path).suffix not in _PLOTS:
                raise UserError(f"--{name}={path}: expected a name that ends in {', '.join(_PLOTS)}")
    if set(taken.values()) & set(names) and importlib.util.find_spec("matplotlib") is None:
        raise UserError("plots need matplotlib; install it with pip install matplotlib, or ask for none")


def contestants(values: flags.FlagValues, model: "Pipeline") -> "list[Contestant]":
    """The methods of --method with the budgets of --keep, each with those of the given flags that are its options.

    Raises:
      UserError: a method cannot serve the model.
    """
    from gemfilter_jax.evals.runner import Contestant

    budgets = list(dict.fromkeys(values.keep.split(","))) if values.keep is not None else [None]
    made: dict[str, Contestant] = {}
    for name in method_names(values):
        for keep in budgets:
            method = methods.make(name, model.preset, **_given(values) | _budget(keep))
            method.check(model.checkpoint.model)
            one = Contestant(name, method.keep_shown, method)
            if made.get(one.label, one).method != method:
                raise UserError(f"--keep={values.keep}: with --recall the budgets of {name} are all auto; give one")
            made[one.label] = one
    return list(made.values())


def _names(method: type[Method]) -> set[str]:
    return {one.name for one in method.options()}


def tell_kept(values: flags.FlagValues, model: "Pipeline", method: Method, result: "Result") -> None:
    """Print the kept passages, if --show_kept, and the closing lines of an answer on standard error."""
    from rich.console import Console

    from gemfilter_jax.reporting import terminal

    if values.show_kept:
        terminal.show_kept(Console(stderr=True), result.selection)
    layers = layers_run(model, method, result.selection)
    print(terminal.closing_lines(result.selection, layers, result.timings), file=sys.stderr)


def layers_run(model: "Pipeline", method: Method, kept: "KeptText") -> str:
    """The layers that stage 1 ran, in words."""
    if kept.kept_tokens == kept.prompt_tokens:
        return "nothing to filter"
    return method.work(model.checkpoint.model.config)
