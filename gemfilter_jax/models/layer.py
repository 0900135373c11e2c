"""One decoder layer and its modules. Axes as in `models.transformer`."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from gemfilter_jax.config import ModelConfig
from gemfilter_jax.models.rope import rotate
from gemfilter_jax.parallel import collectives, sharding
from gemfilter_jax.precision import precision_of

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}
_BLOCK = 512  # rows of the sequence multiplied by a layer's matrices at a time; bounds [B, block, F] temporaries
_LARGEST_INT8 = 127

Table = tuple[jax.Array, jax.Array]
"""Cosines and sines, see `rope.rotary_table`."""

_Result = TypeVar("_Result")
_Module = TypeVar("_Module", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Weights:
    """How weights are stored: in `dtype`, which is also the dtype of activations; if `int8`, matrices in int8."""

    dtype: jnp.dtype
    int8: bool = False

    @property
    def stored(self) -> jnp.dtype:
        """The dtype of matrices."""
        return jnp.dtype(jnp.int8) if self.int8 else self.dtype


def replaced(module: _Module, **attributes: Any) -> _Module:
    """A copy of a module that shares its arrays, with some attributes replaced."""
    copy = jax.tree.map(lambda leaf: leaf, module)
    for name, value in attributes.items():
        setattr(copy, name, value)
    return copy


def _matmul(x: jax.Array, kernel: jax.Array, result: jax.typing.DTypeLike) -> jax.Array:
    return jnp.matmul(x, kernel.astype(x.dtype), precision=precision_of(x), preferred_element_type=result)


def _in_int8(x: jax.Array, axis: int, cut: str | None) -> tuple[jax.Array, jax.Array]:
    """x quantised symmetrically to int8, and float32 scales, one for all values along an axis.

    Args:
      cut: the mesh axis that shards that axis of x; None if it is not sharded.
    """
    wide = x.astype(jnp.float32)
    peak = jnp.abs(wide).max(axis=axis, keepdims=True)
    peak = peak if cut is None else collectives.pmax(peak, cut)
    scale = jnp.maximum(peak, jnp.finfo(jnp.float32).tiny) / _LARGEST_INT8
    return jnp.round(wide / scale).astype(jnp.int8), scale


class Linear(nnx.Module):
    """x [..., in] -> [..., out], kernel [in, out]; an int8 kernel has one float32 scale per output."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        axes: tuple[str, str],
        bias: bool = False,
        weights: Weights,
        rngs: nnx.Rngs,
    ):
        kernel = nnx.initializers.lecun_normal()(rngs.params(), (inputs, outputs), weights.dtype)
        self.kernel = nnx.Param(kernel.astype(weights.stored), axes=axes)
        self.scale = nnx.Param(jnp.ones((outputs,), jnp.float32), axes=axes[1:]) if weights.int8 else None
        self.bias = nnx.Param(jnp.zeros((outputs,), weights.dtype), axes=axes[1:]) if bias else None
        self.int8_products = False
        self.cut = sharding.RULES[axes[0]]

    def __call__(self, x: jax.Array, *, result: jax.typing.DTypeLike | None = None) -> jax.Array:
        """[..., in] -> [..., out], in x's dtype or in `result`; summed over all shards if `in` is sharded."""
        result = result or x.dtype
        kernel, scale = self.kernel[...], None if self.scale is None else self.scale[...]
        if self.int8_products:
            if scale is None:
                kernel, scale = _in_int8(kernel, 0, self.cut)
            rows, row_scales = _in_int8(x, -1, self.cut)
            products = self._total(jnp.matmul(rows, kernel, preferred_element_type=jnp.int32))
            y = (products * (row_scales * scale)).astype(result)
        elif scale is None:
            y = self._total(_matmul(x, kernel, result))
        else:
            y = (self._total(_matmul(x, kernel, jnp.float32)) * scale).astype(result)
        return y if self.bias is None else y + self.bias[...]

    def _total(self, products: jax.Array) -> jax.Array:
        return products if self.cut is None else collectives.psum(products, self.cut)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis (Zhang and Sennrich 2019), in float32."""

    def __init__(self, width: int, eps: float, *, axis: str, weights: Weights):
        self.scale = nnx.Param(jnp.ones((width,), weights.dtype), axes=(axis,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] -> the same shape and dtype."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.scale[...]


class DecoderLayer(nnx.Module):
    """One layer: attention in separate steps, so that a caller can stop between them, and the MLP."""

    def __init__(self, config: ModelConfig, *, weights: Weights, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int, axes: tuple[str, str], bias: bool) -> Linear:
            return Linear(inputs, outputs, axes=axes, bias=bias, weights=weights, rngs=rngs)

        def norm(width: int, axis: str) -> RMSNorm:
            return RMSNorm(width, c.rms_eps, axis=axis, weights=weights)

        c = config
        self.head_width = c.head_width
        self.activation = c.activation
        self.attention_norm = norm(c.width, "embed")
        self.query = linear(c.width, c.heads * c.head_width, ("embed", "heads"), c.attention_bias)
        self.key = linear(c.width, c.kv_heads * c.head_width, ("embed", "kv_heads"), c.attention_bias)
        self.value = linear(c.width, c.kv_heads * c.head_width, ("embed", "kv_heads"), c.attention_bias)
        self.query_norm = norm(c.head_width, "head_width") if c.qk_norm else None
        self.key_norm = norm(c.head_width, "head_width") if c.qk_norm else None
        self.output = linear(c.heads * c.head_width, c.width, ("heads", "embed"), c.output_bias)
        self.mlp_norm = norm(c.width, "embed")
        self.gate = linear(c.width, c.mlp_width, ("embed", "mlp"), c.mlp_bias)
        self.up = linear(c.width, c.mlp_width, ("embed", "mlp"), c.mlp_bias)
        self.down = linear(c.mlp_width, c.width, ("mlp", "embed"), c.mlp_bias)

    def with_own_key_head(self, kv_heads: int) -> "DecoderLayer":
        """The layer with only this shard's key head if shards outnumber key heads; otherwise unchanged."""
        parts = collectives.axis_size("model")
        if parts <= kv_heads:
            return self
        start = collectives.axis_index("model") // (parts // kv_heads) * self.head_width

        def kept(parameter: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(parameter, start, self.head_width, axis=-1)

        return replaced(self, key=jax.tree.map(kept, self.key), value=jax.tree.map(kept, self.value))

    def in_int8(self) -> "DecoderLayer":
        """The layer that rounds weights and activations to int8 before every matrix product; see `Decoder.in_int8`."""
        names = ("query", "key", "value", "output", "gate", "up", "down")
        return replaced(self, **{name: replaced(getattr(self, name), int8_products=True) for name in names})

    def queries(self, normed: jax.Array, table: Table) -> jax.Array:
        """[B, S, D] -> rotated queries [B, S, H, E]."""
        return self._rotated(self.query(normed), self.query_norm, table)

    def keys(self, normed: jax.Array, table: Table) -> jax.Array:
        """[B, S, D] -> rotated keys [B, S, G, E]."""
        return self._rotated(self.key(normed), self.key_norm, table)

    def values(self, normed: jax.Array) -> jax.Array:
        """[B, S, D] -> values [B, S, G, E]."""
        return self._split_heads(self.value(normed))

    def _rotated(self, x: jax.Array, norm: RMSNorm | None, table: Table) -> jax.Array:
        heads = self._split_heads(x)
        return rotate(heads if norm is None else norm(heads), table)

    def open(self, x: jax.Array, table: Table, rows: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Residual stream x [B, S, D] -> rotated queries [B, S, H, E] and keys [B, S, G, E], and values [B, S, G, E].

        Args:
          rows: number of leading rows that are real, may be traced; blocks after them stay zero.
        """

        def project(_: Any, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            normed, table = self.attention_norm(x), (cos, sin)
            return self.queries(normed, table), self.keys(normed, table), self.values(normed)

        made = jax.eval_shape(project, None, x, *table)
        zeros = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), made)
        return _in_blocks(project, rows, zeros, x, *table)

    def close(self, x: jax.Array, attended: jax.Array, rows: jax.typing.ArrayLike) -> jax.Array:
        """Residual stream x [B, S, D] and attention's result [B, S, H, E] -> the next layer's x.

        Args:
          rows: number of leading rows that are real, may be traced; blocks after them stay as they are.
        """

        def finish(x: jax.Array, attended: jax.Array) -> jax.Array:
            x = x + self.output(attended)
            return x + self._mlp(x)

        return _in_blocks(finish, rows, x, attended.reshape(*x.shape[:2], -1))

    def _mlp(self, x: jax.Array) -> jax.Array:
        with jax.named_scope("mlp"):
            normed = self.mlp_norm(x)
            return self.down(ACTIVATIONS[self.activation](self.gate(normed)) * self.up(normed))

    def _split_heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, self.head_width)


def _in_blocks(fn: Callable[..., _Result], rows: jax.typing.ArrayLike, into: _Result, *xs: jax.Array) -> _Result:
    """`into` with its rows replaced by fn of them, a block at a time; blocks from `rows` on stay as they are.

    XLA updates `into` in place if nothing else reads it.

    Args:
      fn: takes the same rows of `into` and of each x, and returns those of the result.
      into, xs: arrays whose second axis is rows.
    """
    length = xs[0].shape[1]
    if length <= _BLOCK:
        return fn(into, *xs)

    def replace_block(index: jax.Array, into: _Result) -> _Result:
        start = jnp.minimum(index * _BLOCK, length - _BLOCK)
        block = [jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, _BLOCK, 1), one) for one in (into, *xs)]
        made = fn(*block)
        if length % _BLOCK:  # the last block overlaps the one before, whose rows are replaced already
            new = start + jnp.arange(_BLOCK) >= index * _BLOCK
            made = jax.tree.map(
                lambda made, held: jnp.where(new.reshape(-1, *(1,) * (made.ndim - 2)), made, held), made, block[0]
            )
        return jax.tree.map(lambda x, made: jax.lax.dynamic_update_slice_in_dim(x, made, start, 1), into, made)

    blocks = -(-jnp.minimum(rows, length) // _BLOCK)
    return jax.lax.fori_loop(0, blocks, replace_block, into)
