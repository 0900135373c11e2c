"""Flags that several commands share, and what is made of them."""

import contextlib
import dataclasses
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from gemfilter_jax import files
from gemfilter_jax.errors import UserError
from gemfilter_jax.parallel import processes

if TYPE_CHECKING:  # commands parse their flags before they import JAX, so that a mistake is told at once
    from collections.abc import Callable

    from rich.console import Console

    from gemfilter_jax.config import ModelConfig
    from gemfilter_jax.methods.gemfilter.method import GemFilter, Method
    from gemfilter_jax.methods.presets import Preset
    from gemfilter_jax.pipeline import KeptText, Pipeline, Result

_METHODS = ("full", "default", "paper")
_ALL_METHODS = (*_METHODS, "uncalibrated")


def define_weights(values: flags.FlagValues) -> None:
    """--model and how to hold its weights."""
    flags.DEFINE_string("model", "smollm2", "A model folder, a .gguf file, a hub id, or smollm2.", flag_values=values)
    flags.DEFINE_enum(
        "dtype",
        "auto",
        ["auto", "float32", "bfloat16"],
        "Of weights and activations; auto is bfloat16 on accelerators, float32 on CPU.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "weights",
        "float",
        ["float", "int8"],
        "How matrices are held; int8 takes about half the bytes of bfloat16.",
        flag_values=values,
    )


def define_model(values: flags.FlagValues) -> None:
    """--model and how to load and address it."""
    define_weights(values)
    flags.DEFINE_bool("chat_template", True, "Wrap prompts in the model's chat template.", flag_values=values)
    flags.DEFINE_string(
        "message_format",
        None,
        "How text and question become one message; holds {text} once and {question} after it.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "attention",
        "auto",
        ["auto", "xla", "splash", "cudnn"],
        "What computes attention to prompts: xla anywhere, splash on TPU, cudnn on GPU; auto is the first that serves.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "mesh",
        "auto",
        "How devices share the work, as data:N,seq:N,model:N: batches, long prompts, and the model's heads and MLP are "
        "cut into so many parts; auto takes all devices, as few for the model as hold it.",
        flag_values=values,
    )


def define_distributed(values: flags.FlagValues) -> None:
    """How several processes become one run; `command.run` joins them."""
    flags.DEFINE_bool(
        "distributed",
        False,
        "Be one process of a run of several, told by the environment (TPU VM pods, Slurm, Open MPI, Kubernetes).",
        flag_values=values,
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT where the first of several listens.", flag_values=values)
    flags.DEFINE_integer("processes", None, "How many processes there are.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process", None, "Which one this is, counted from 0.", lower_bound=0, flag_values=values)


def joined(values: flags.FlagValues) -> contextlib.AbstractContextManager[None]:
    """The run that the flags of `define_distributed` tell of, if there are any.

    Raises:
      UserError: they do not fit together.
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


def define_filter(values: flags.FlagValues) -> None:
    """--preset, --keep, --filter_layer, and how the layers before it read."""
    flags.DEFINE_string(
        "preset", None, "Filter settings of the model, a JSON file; those built in if not given.", flag_values=values
    )
    flags.DEFINE_string(
        "keep",
        None,
        "Tokens to keep; auto is as many as hold a share of the score, up to the preset's number. The preset's choice "
        "if not given.",
        flag_values=values,
    )
    flags.register_validator(
        "keep",
        lambda keep: keep in (None, "auto") or (keep.isdecimal() and int(keep) >= 1),
        message="expected auto or a whole number of at least 1",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "filter_layer",
        None,
        "The layer that picks, from 0; the model's preset if not given.",
        lower_bound=0,
        flag_values=values,
    )

    define_filter_pass(values, attention=None, precision=None)
    flags.DEFINE_integer("band", None, "Keys before each row that tri_shape sees.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("first_tokens", None, "First keys that tri_shape sees.", lower_bound=0, flag_values=values)


def define_order(values: flags.FlagValues) -> None:
    """--order, for commands that answer from what was kept."""
    flags.DEFINE_enum(
        "order",
        None,
        ["text", "best_last"],
        "Of the kept passages before the model that answers: as in the text, or the best next to the question; the "
        "preset's if not given.",
        flag_values=values,
    )


def define_filter_pass(values: flags.FlagValues, *, attention: str | None, precision: str | None) -> None:
    """--filter_attention and --filter_precision, with their defaults; None for the preset's."""
    flags.DEFINE_enum(
        "filter_precision",
        precision,
        ["float", "int8"],
        "Of the matrix products of the layers before the one that picks; float is the model's own.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "filter_attention",
        attention,
        ["auto", "dense", "tri_shape"],
        "Of the layers before the one that picks: tri_shape is linear in the prompt; auto is that for long prompts.",
        flag_values=values,
    )


def define_rule(values: flags.FlagValues) -> None:
    """--rule."""
    flags.DEFINE_enum("rule", "default", ["default", "paper"], "How tokens are picked.", flag_values=values)


def define_prompt_file(values: flags.FlagValues, otherwise: str) -> None:
    """--prompt_file, and what happens without it."""
    flags.DEFINE_string("prompt_file", None, f"The long text; {otherwise}.", flag_values=values)


def define_kept_text(values: flags.FlagValues) -> None:
    """What to make of the kept text."""
    flags.DEFINE_enum("format", "text", ["text", "json"], "Of what is printed.", flag_values=values)
    flags.DEFINE_string(
        "report", None, "Write an HTML page with the kept passages highlighted to this file.", flag_values=values
    )


def define_answer(values: flags.FlagValues) -> None:
    """How answers are written, and --show_kept."""
    flags.DEFINE_integer("max_new_tokens", 128, "Tokens to write at most.", lower_bound=1, flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "0 is greedy.", lower_bound=0.0, flag_values=values)
    flags.DEFINE_integer(
        "top_k", 0, "Draw among this many likeliest tokens; 0 is all.", lower_bound=0, flag_values=values
    )
    flags.DEFINE_float(
        "top_p",
        1.0,
        "Draw among the fewest tokens that hold this share.",
        lower_bound=0.0,
        upper_bound=1.0,
        flag_values=values,
    )
    flags.DEFINE_integer("seed", 0, "Of the draws.", lower_bound=0, flag_values=values)
    flags.DEFINE_bool("show_kept", False, "Show the kept passages, highlighted, on standard error.", flag_values=values)


def define_document_cache(values: flags.FlagValues) -> None:
    """--document_cache."""
    flags.DEFINE_string(
        "document_cache",
        None,
        "Keep what was read of the text in this folder, so that later questions need not read it again.",
        flag_values=values,
    )


def answer_settings(values: flags.FlagValues) -> dict[str, Any]:
    """The flags of `define_answer` as arguments of `Pipeline.generate`."""
    from gemfilter_jax.generate.sampling import Sampling

    sampling = Sampling(values.temperature, values.top_k, values.top_p)
    return {"max_new_tokens": values.max_new_tokens, "sampling": sampling, "seed": values.seed}


def define_comparison(values: flags.FlagValues, lengths: list[str]) -> None:
    """--method, --lengths and --output of commands that compare."""
    flags.DEFINE_multi_enum(
        "method",
        list(_METHODS),
        _ALL_METHODS,
        "What to compare, may be given several times; uncalibrated: the default rule, the paper's layer, all heads.",
        flag_values=values,
    )
    flags.DEFINE_list("lengths", lengths, "Tokens of text, several with commas.", flag_values=values)
    flags.DEFINE_string("output", None, "Write the result as JSON to this file.", flag_values=values)


def read_prompt(values: flags.FlagValues) -> str:
    """The prompt's text.

    Raises:
      UserError: there is none, or it is not UTF-8.
    """
    if values.prompt_file is None:
        if sys.stdin.isatty():
            raise UserError("no prompt; give --prompt_file=FILE or send text to standard input")
        name = "standard input"
        text = files.decoded(sys.stdin.buffer.read(), name)
    else:
        name = f"--prompt_file={values.prompt_file}"
        text = files.read_text(pathlib.Path(values.prompt_file), name)
    if not text.strip():
        raise UserError(f"{name}: the prompt is empty; give some text")
    return text


def console() -> "Console":
    """Standard error, where progress is shown; silent in all but the first of several processes."""
    from rich.console import Console

    return Console(stderr=True, quiet=not processes.is_first())


def load_pipeline(
    values: flags.FlagValues,
    *,
    layers: "Callable[[Preset, ModelConfig], int] | None" = None,
    many_prompts: bool = False,
) -> "Pipeline":
    """Load --model onto --mesh.

    Args:
      layers: how many first layers are enough, without an LM head; None for the whole model.
      many_prompts: rather cut batches than prompts.
    """
    from gemfilter_jax import checkpoints, pipeline
    from gemfilter_jax.methods import presets
    from gemfilter_jax.parallel import sharding
    from gemfilter_jax.reporting import terminal
    from gemfilter_jax.text import prompt

    opened = checkpoints.open_checkpoint(values.model)
    if "preset" in values and values.preset is not None:
        preset = presets.read_preset(pathlib.Path(values.preset), opened.config)
    else:
        preset = presets.preset_for(opened.config)
    filter_layers = min(layers(preset, opened.config), opened.config.layers) if layers else None
    held = {"dtype": values.dtype, "weights": values.weights, "filter_layers": filter_layers}
    mesh = checkpoints.mesh_for(opened, values.mesh, many_prompts=many_prompts, **held)
    if mesh is not None:
        logging.info("mesh: %s", sharding.shape_of(mesh))
    with terminal.loading_progress(console()) as progress:
        return pipeline.load(
            opened,
            **held,
            mesh=mesh,
            preset=preset,
            chat_template=values.chat_template,
            message_format=values.message_format or prompt.MESSAGE_FORMAT,
            attention=None if values.attention == "auto" else values.attention,
            progress=progress,
        )


def chosen_method(values: flags.FlagValues, model: "Pipeline") -> "GemFilter":
    """--rule, --keep and --filter_layer over the model's preset; says so where the model has none."""
    if model.preset.name == "none" and values.filter_layer is None and processes.is_first():
        print(model.preset.source, file=sys.stderr)
    return _method(values, model, values.rule)


def _method(values: flags.FlagValues, model: "Pipeline", name: str) -> "GemFilter":
    rule = "default" if name == "uncalibrated" else name
    method = model.method(rule, keep=_keep(values), filter_layer=values.filter_layer)
    if name == "uncalibrated":
        layer = model.preset.paper_layer if values.filter_layer is None else values.filter_layer
        method = dataclasses.replace(method, filter_layer=layer, head_weights=None)
    names = ("filter_attention", "band", "first_tokens", "filter_precision", "order")
    given = {name: values[name].value for name in names if name in values and values[name].value is not None}
    return dataclasses.replace(method, **given)


def _keep(values: flags.FlagValues) -> Any:
    """--keep as `Pipeline.method` takes it."""
    return values.keep if values.keep in (None, "auto") else int(values.keep)


def lengths(values: flags.FlagValues) -> list[int]:
    """--lengths as numbers."""
    for length in values.lengths:
        if not length.isdecimal() or int(length) < 1:
            raise UserError(f"--lengths={','.join(values.lengths)}: {length!r} is not a whole number of at least 1")
    return [int(length) for length in values.lengths]


def compared_methods(values: flags.FlagValues, model: "Pipeline") -> dict[str, "Method"]:
    """--method, each with the flags of `define_filter` where it has them."""
    from gemfilter_jax.methods.gemfilter.method import Full

    return {name: Full() if name == "full" else _method(values, model, name) for name in values.method}


def tell_kept(values: flags.FlagValues, model: "Pipeline", method: "GemFilter", result: "Result") -> None:
    """After an answer, on standard error: the kept passages if --show_kept, and the closing lines."""
    from rich.console import Console

    from gemfilter_jax.reporting import terminal

    if values.show_kept:
        terminal.show_kept(Console(stderr=True), result.selection)
    layers = layers_run(model, method, result.selection)
    print(terminal.closing_lines(result.selection, layers, result.timings), file=sys.stderr)


def layers_run(model: "Pipeline", method: "GemFilter", kept: "KeptText") -> str:
    """How much of the model stage 1 ran, for people."""
    if kept.kept_tokens == kept.prompt_tokens:
        return "nothing to filter"
    return f"layers 0 to {method.filter_layer} of {model.checkpoint.model.config.layers} picked"
