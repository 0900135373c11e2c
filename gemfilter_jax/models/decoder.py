"""The decoder, once, for every family: pre-norm attention and gated-MLP layers stacked in one pytree.

Axes: B batch, S sequence, W observation rows, C cache capacity, L layers, D model width, H query heads,
G key/value heads, E head width, F MLP width, V vocabulary. Sequences are padded on the right; `lengths` [B] are the
true lengths. Norms, rotary, softmax and logits are computed in float32, everything else in the weights' dtype.

Layer weights carry a leading L axis and layers are walked by a loop whose bound may be traced, so one compiled program
serves every number of layers.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from gemfilter_jax import attention
from gemfilter_jax.attention import TriShape
from gemfilter_jax.config import ModelConfig
from gemfilter_jax.errors import UserError
from gemfilter_jax.kv_cache import FilterState, KVCache
from gemfilter_jax.models.rotary import rotary_table, rotate

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}
_BLOCK = 512  # rows of the sequence that pass through the MLP at a time: bounds its [B, block, F] temporaries

_ALL = 2**30  # the window of a layer without one: wider than any prompt

_Table = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Weights:
    """How weights are held: in `dtype`, which is also that of activations, or, if `int8`, matrices in that."""

    dtype: jnp.dtype
    int8: bool = False

    @property
    def stored(self) -> jnp.dtype:
        """The dtype of matrices."""
        return jnp.dtype(jnp.int8) if self.int8 else self.dtype


def _matmul(x: jax.Array, kernel: jax.Array, result: jax.typing.DTypeLike) -> jax.Array:
    """Float32 activations mean float32 products: accelerators would otherwise round them down."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.matmul(x, kernel.astype(x.dtype), precision=precision, preferred_element_type=result)


class Linear(nnx.Module):
    """x [..., in] -> [..., out], kernel [in, out]; of an int8 kernel, one float32 scale for each output."""

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

    def __call__(self, x: jax.Array, *, result: jax.typing.DTypeLike | None = None) -> jax.Array:
        """[..., in] -> [..., out], in x's dtype or that of `result`."""
        result = result or x.dtype
        if self.scale is None:
            y = _matmul(x, self.kernel[...], result)
        else:
            y = (_matmul(x, self.kernel[...], jnp.float32) * self.scale[...]).astype(result)
        return y if self.bias is None else y + self.bias[...]


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
    """One layer: the pieces of attention, so that a caller may stop between them, and the MLP."""

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

    def queries(self, normed: jax.Array, table: _Table) -> jax.Array:
        """[B, S, D] -> rotated queries [B, S, H, E]."""
        return self._rotated(self.query(normed), self.query_norm, table)

    def keys(self, normed: jax.Array, table: _Table) -> jax.Array:
        """[B, S, D] -> rotated keys [B, S, G, E]."""
        return self._rotated(self.key(normed), self.key_norm, table)

    def values(self, normed: jax.Array) -> jax.Array:
        """[B, S, D] -> values [B, S, G, E]."""
        return self._split_heads(self.value(normed))

    def _rotated(self, x: jax.Array, norm: RMSNorm | None, table: _Table) -> jax.Array:
        heads = self._split_heads(x)
        return rotate(heads if norm is None else norm(heads), table)

    def close(self, x: jax.Array, attended: jax.Array, rows: jax.typing.ArrayLike) -> jax.Array:
        """Residual stream x [B, S, D] and attention's result [B, S, H, E] -> the next layer's x.

        Args:
          rows: so many first rows are real, may be traced; the blocks past them are left out.
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


def _in_blocks(fn: Callable[..., jax.Array], rows: jax.typing.ArrayLike, *xs: jax.Array) -> jax.Array:
    """fn over blocks of the sequence axis of all xs [B, S, ...], one at a time; zeros for blocks from `rows` on."""
    batch, length = xs[0].shape[:2]
    if length <= _BLOCK:
        return fn(*xs)
    padding = -length % _BLOCK
    blocks = [
        jnp.pad(x, ((0, 0), (0, padding), (0, 0))).reshape(batch, -1, _BLOCK, x.shape[-1]).swapaxes(0, 1) for x in xs
    ]

    def unless_padding(numbered):
        index, *block = numbered
        return jax.lax.cond(index * _BLOCK < rows, fn, lambda x, *_: jnp.zeros_like(x), *block)

    done = jax.lax.map(unless_padding, (jnp.arange(len(blocks[0])), *blocks))
    return done.swapaxes(0, 1).reshape(batch, -1, done.shape[-1])[:, :length]


class Decoder(nnx.Module):
    """A decoder-only language model. A pytree: pass it to `jax.jit`, map over it, shard it.

    Args:
      dtype: of weights and activations.
      int8: hold matrices but the embedding as int8, symmetric, with a float32 scale for each output channel.
      filter_layers: hold only so many layers and no LM head, which is enough for stage 1; None for the whole model.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        int8: bool = False,
        filter_layers: int | None = None,
        rngs: nnx.Rngs,
    ):
        if config.activation not in ACTIVATIONS:
            raise UserError(
                f"model config: activation {config.activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
            )
        weights = Weights(jnp.dtype(dtype), int8)
        whole = filter_layers is None
        self.config = config
        self.held_layers = config.layers if filter_layers is None else filter_layers
        table = nnx.initializers.normal(0.02)(rngs.params(), (config.vocab, config.width), weights.dtype)
        self.embedding = nnx.Param(table, axes=("vocab", "embed"))
        self.layers = jax.vmap(lambda key: DecoderLayer(config, weights=weights, rngs=nnx.Rngs(key)))(
            jax.random.split(rngs.params(), self.held_layers)
        )
        self.final_norm = RMSNorm(config.width, config.rms_eps, axis="embed", weights=weights) if whole else None
        self.lm_head = (
            Linear(config.width, config.vocab, axes=("embed", "vocab"), weights=weights, rngs=rngs)
            if whole and not config.tie_embeddings
            else None
        )

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of activations."""
        return self.embedding[...].dtype

    def layer(self, index: jax.typing.ArrayLike) -> DecoderLayer:
        """Layer `index`, which may be traced."""
        return jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, index, keepdims=False), self.layers)

    def _window(self, index: jax.typing.ArrayLike) -> jax.Array | None:
        """The sliding window of layer `index`, which may be traced."""
        if self.config.sliding_windows is None:
            return None
        return jnp.asarray([window or _ALL for window in self.config.sliding_windows], jnp.int32)[index]

    def _through(
        self, index: jax.typing.ArrayLike, x: jax.Array, table: _Table, lengths: jax.Array, pattern: TriShape | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A prompt through layer `index`: the next layer's x [B, S, D], and this one's keys and values [B, S, G, E]."""
        with jax.named_scope("layer"):
            layer = self.layer(index)
            normed = layer.attention_norm(x)
            q, k, v = layer.queries(normed, table), layer.keys(normed, table), layer.values(normed)
            attended = attention.causal(q, k, v, lengths=lengths, window=self._window(index), pattern=pattern)
            return layer.close(x, attended, jnp.max(lengths)), k, v

    def hidden_states(
        self,
        ids: jax.Array,
        lengths: jax.Array,
        layers: jax.typing.ArrayLike,
        pattern: TriShape | None = None,
    ) -> jax.Array:
        """The residual stream [B, S, D] that enters layer `layers`, for ids [B, S]. No cache is kept.

        Args:
          pattern: of attention, None for dense.
        """
        table = self._table(ids, lengths)

        def body(index, x):
            return self._through(index, x, table, lengths, pattern)[0]

        return jax.lax.fori_loop(0, layers, body, self.embedding[...][ids])

    def keys_and_last_queries(
        self,
        ids: jax.Array,
        lengths: jax.Array,
        layer: jax.typing.ArrayLike,
        window: int,
        pattern: TriShape | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What the filter needs of layer `layer`, and nothing past it.

        Layers 0..layer-1 run whole; of layer `layer` only the input norm, the keys of all positions and the queries of
        the last `window` real positions are computed.

        Args:
          ids: [B, S]. lengths: [B]. layer: 0-based index, may be traced. window: W.
          pattern: of the attention in the layers before it, None for dense.

        Returns:
          q [B, W, H, E] and k [B, S, G, E], both after rotary, and rows [B, W], the positions of q; a row before the
          start of a prompt shorter than W has a negative position and a meaningless q.
        """
        x = self.hidden_states(ids, lengths, layer, pattern)
        return self._view(layer, x, lengths, window)

    def _view(
        self, index: jax.typing.ArrayLike, x: jax.Array, lengths: jax.Array, window: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What `keys_and_last_queries` returns, from the x [B, S, D] that enters layer `index`."""
        with jax.named_scope("filter_layer"):
            layer = self.layer(index)
            k = layer.keys(layer.attention_norm(x), self._table(x, lengths))
            rows = lengths[:, None] - window + jnp.arange(window)
            x_rows = jnp.take_along_axis(x, jnp.maximum(rows, 0)[..., None], axis=1)
            q = layer.queries(layer.attention_norm(x_rows), rotary_table(self.config, rows, lengths))
        return q, k, rows

    def at_each_layer(
        self,
        ids: jax.Array,
        lengths: jax.Array,
        layers: int,
        window: int,
        look: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        pattern: TriShape | None = None,
    ) -> jax.Array:
        """look(q, k, rows) of what `keys_and_last_queries` gives at each of the first `layers` layers, stacked."""
        table = self._table(ids, lengths)

        def body(x, index):
            seen = look(*self._view(index, x, lengths, window))
            return self._through(index, x, table, lengths, pattern)[0], seen

        return jax.lax.scan(body, self.embedding[...][ids], jnp.arange(layers))[1]

    def read(
        self, ids: jax.Array, lengths: jax.Array, extents: jax.Array, layer: int, pattern: TriShape | None = None
    ) -> FilterState:
        """What the filter at `layer` needs of the beginnings of prompts.

        Args:
          ids: [B, S], the beginnings. lengths: [B], theirs. extents: [B], those of the whole prompts.
          pattern: of attention, None for dense.
        """
        table = self._table(ids, extents)

        def body(x, index):
            x, k, v = self._through(index, x, table, lengths, pattern)
            return x, (k, v)

        x, (keys, values) = jax.lax.scan(body, self.embedding[...][ids], jnp.arange(layer))
        last = self.layer(layer)
        return FilterState(keys, values, last.keys(last.attention_norm(x), table), lengths)

    def keys_and_last_queries_after(
        self, state: FilterState, ids: jax.Array, lengths: jax.Array, window: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `keys_and_last_queries`, of prompts whose beginnings have been read.

        Args:
          state: of B beginnings. ids: [B, T], what follows them. lengths: [B], how much of it; at least `window`.

        Returns:
          q [B, W, H, E], k [B, S + T, G, E] and rows [B, W]; k's first entries are the beginning's and what follows it.
        """
        table = rotary_table(self.config, state.positions(ids.shape[1]), state.lengths + lengths)

        def body(x, layer_state):
            index, k, v = layer_state
            layer = self.layer(index)
            normed = layer.attention_norm(x)
            k = state.followed(k, layer.keys(normed, table))
            v = state.followed(v, layer.values(normed))
            q, positions = layer.queries(normed, table), state.positions(ids.shape[1])
            attended = attention.rows(q, positions, k, v, window=self._window(index))
            return layer.close(x, attended, jnp.max(lengths)), None

        stacked = (jnp.arange(len(state.keys)), state.keys, state.values)
        x, _ = jax.lax.scan(body, self.embedding[...][ids], stacked)
        last = self.layer(len(state.keys))
        normed = last.attention_norm(x)
        k = state.followed(state.last_keys, last.keys(normed, table))
        observed = lengths[:, None] - window + jnp.arange(window)
        q = jnp.take_along_axis(last.queries(normed, table), observed[..., None, None], axis=1)
        return q, k, state.lengths[:, None] + observed

    def _table(self, tokens: jax.Array, lengths: jax.Array) -> _Table:
        """The rotary table of prompts that begin at position 0, ids or x [B, S, ...]."""
        return rotary_table(self.config, jnp.arange(tokens.shape[1])[None], lengths)

    def prefill(
        self, ids: jax.Array, lengths: jax.Array, positions: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """Run a prompt through all layers and fill an empty cache with it.

        Args:
          ids: [B, K]. lengths: [B]. positions: [B, K], the rotary position of each token.
          cache: of capacity C >= K.

        Returns:
          float32 logits [B, V] of each row's last real position, and the filled cache.
        """
        extents = jnp.take_along_axis(positions, (lengths - 1)[:, None], axis=1)[:, 0] + 1
        table = rotary_table(self.config, positions, extents)

        def body(index, carry):
            x, cache = carry
            x, k, v = self._through(index, x, table, lengths, None)
            return x, cache.write_prompt(index, k, v)

        x, cache = jax.lax.fori_loop(0, self.config.layers, body, (self.embedding[...][ids], cache))
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.logits(last), cache.advanced_to(lengths)

    def decode(self, ids: jax.Array, positions: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """One more token per row: ids [B] at rotary positions [B] -> float32 logits [B, V] and the grown cache."""
        table = rotary_table(self.config, positions[:, None], positions + 1)
        lengths = cache.lengths + 1

        def body(index, carry):
            x, cache = carry
            layer = self.layer(index)
            normed = layer.attention_norm(x)
            cache = cache.append(index, layer.keys(normed, table), layer.values(normed))
            k, v = cache.layer(index)
            q = layer.queries(normed, table)
            attended = attention.one_row(q, k, v, lengths=lengths, window=self._window(index))
            return layer.close(x, attended, 1), cache

        x, cache = jax.lax.fori_loop(0, self.config.layers, body, (self.embedding[...][ids[:, None]], cache))
        return self.logits(x[:, 0]), cache.advanced_to(lengths)

    def logits(self, x: jax.Array) -> jax.Array:
        """Residual stream [..., D] after the last layer -> float32 logits [..., V]."""
        if self.final_norm is None:
            raise UserError(
                f"only the first {self.held_layers} layers of the model are loaded, which can select but not generate"
            )
        with jax.named_scope("lm_head"):
            normed = self.final_norm(x)
            if self.lm_head is None:
                return _matmul(normed, self.embedding[...].T, jnp.float32)
            return self.lm_head(normed, result=jnp.float32)
