"""The programs of both stages, with arguments to compile them: shapes of weights, and values that control loops."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemfilter_jax.buckets import bucket
from gemfilter_jax.calls import Call
from gemfilter_jax.config import ModelConfig
from gemfilter_jax.errors import UserError
from gemfilter_jax.generate import loop
from gemfilter_jax.generate.sampling import GREEDY
from gemfilter_jax.methods.gemfilter import scoring_pass
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.models.transformer import Decoder
from gemfilter_jax.parallel import sharding
from gemfilter_jax.planning import costs
from gemfilter_jax.planning.costs import Costs

_SUFFIX = 64  # tokens of the question and the template after the document


@dataclasses.dataclass(frozen=True)
class Request:
    """A run to plan.

    Attributes:
      tokens: length of each prompt. batch: prompts per batch. new_tokens: length of each answer.
      method: settings of the filter. int8: whether weight matrices are stored as int8.
    """

    config: ModelConfig
    tokens: int
    method: GemFilter
    new_tokens: int = 128
    batch: int = 1
    int8: bool = False

    def __post_init__(self) -> None:
        layer, layers = self.method.filter_layer, self.config.layers
        if layer >= layers:
            raise UserError(f"filter layer {layer} is out of range; the model has layers 0 to {layers - 1}")
        if self.method.keep >= self.tokens:
            raise UserError(f"keep is {self.method.keep} of {self.tokens} tokens, which leaves nothing to filter")
        if self.method.keep + self.new_tokens > self.config.context:
            raise UserError(
                f"{self.method.keep} kept tokens and {self.new_tokens} new ones exceed the model's context of "
                f"{self.config.context}; keep fewer"
            )

    @property
    def is_tri_shape(self) -> bool:
        """Whether the filter uses `TriShape` attention."""
        return scoring_pass.is_tri_shape(self.method, self.tokens - _SUFFIX)


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and its arguments, NumPy arrays or shapes; `idle` holds the weights that it does not use."""

    function: Any
    model: Decoder
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    idle: tuple[Any, ...] = ()

    def lower(self) -> jax.stages.Lowered:
        """Lower the program for the model's devices."""
        return self.function.lower(self.model, *self.arguments, **self.options)

    def costs(self) -> Costs:
        """Costs on one device with XLA attention, whose jaxpr contains every matrix product."""
        model = self.model.replace(attention_implementation="xla")
        return costs.of_program(self.function, model, *self.arguments, **self.options)


def of_call(call: Call) -> Program:
    """A program as it was called, on arguments that were not donated."""
    model, *arguments = call.arguments
    known = jax.tree.map(
        lambda leaf: np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf, (tuple(arguments), call.options)
    )
    return Program(call.function, model, *known)


def filtering(model: Decoder, request: Request, *, whole: bool = False) -> Program:
    """Stage 1; if `whole`, dense attention through all layers, which approximates a prefill of the whole prompt."""
    method, rows = request.method, _rows(request.batch, sharding.shape_of(model.mesh).data)
    suffix_lengths = np.full(rows, _SUFFIX, np.int32)
    scoring = scoring_pass.ScoringPass.of(
        method, request.config.heads, document=request.tokens - _SUFFIX, suffix_lengths=suffix_lengths
    )
    if whole:
        scoring = dataclasses.replace(scoring, filter_layer=jnp.int32(request.config.layers), pattern=None)
    arguments = (
        np.zeros((rows, bucket(request.tokens)), np.int32),
        np.full(rows, request.tokens, np.int32),
        suffix_lengths,
        jax.tree.map(np.asarray, scoring),
    )
    return Program(scoring_pass.score_prompt, model, arguments, {}, idle=(model.final_norm, model.lm_head))


def prefill(model: Decoder, request: Request, *, kept: int | None = None) -> Program:
    """The prefill of stage 2 with `kept` tokens, or as many as the method keeps if None."""
    rows = _rows(request.batch, sharding.shape_of(model.mesh).generating(model.config).data)
    kept = request.method.keep if kept is None else kept
    arguments = (
        np.zeros((rows, bucket(kept)), np.int32),
        np.full(rows, kept, np.int32),
        np.arange(bucket(kept), dtype=np.int32)[None].repeat(rows, axis=0),
    )
    options = {
        "stop_tokens": np.zeros(1, np.int32),
        "sampling": jax.tree.map(np.float32, GREEDY),
        "seeds": np.zeros(rows, np.uint32),
        "limit": np.asarray(request.new_tokens, np.int32),
        "capacity": bucket(request.new_tokens),
    }
    return Program(loop.prefill, model, arguments, options)


def decode(before: Program, shardings: Any = None) -> Program:
    """One decode step of stage 2.

    Args:
      before: the prefill.
      shardings: shardings of the prefill's output state; if None, its lengths, positions and limits are known values.
    """
    begin = functools.partial(before.function, **before.options)
    state = jax.eval_shape(begin, before.model, *before.arguments)
    if shardings is None:
        _, lengths, _ = before.arguments
        state = dataclasses.replace(
            state,
            lengths=np.ones_like(lengths),
            stopped=np.zeros_like(lengths, bool),
            positions=lengths,
            limit=before.options["limit"],
            sampling=before.options["sampling"],
        )
    else:
        state = jax.tree.map(
            lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout), state, shardings
        )
    return Program(loop.decode_step, before.model, (state,), {})


def _rows(batch: int, parts: int) -> int:
    return len(sharding.evenly(range(batch), parts))


def bytes_on_device(tree: Any) -> int:
    """Bytes of arrays and shapes on one device; leaves without a sharding count in full."""

    def size(leaf: Any) -> int:
        layout = getattr(leaf, "sharding", None)
        shape = leaf.shape if layout is None else layout.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape"))
