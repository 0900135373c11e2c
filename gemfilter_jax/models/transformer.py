"""The decoder, once, for every family: pre-norm attention and gated-MLP layers stacked in one pytree.

Axes: B batch, S sequence, W observation rows, C cache capacity, L layers, D model width, H query heads,
G key/value heads, E head width, F MLP width, V vocabulary. Sequences are padded on the right; `lengths` [B] are the
true lengths. Norms, rotary, softmax and logits are computed in float32, everything else in the weights' dtype.

Layer weights carry a leading L axis and layers are walked by a loop whose bound may be traced, so one compiled program
serves every number of layers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from gemfilter_jax.config import ModelConfig
from gemfilter_jax.errors import UserError
from gemfilter_jax.models.cache import FilterState, KVCache
from gemfilter_jax.models.layer import ACTIVATIONS, DecoderLayer, Linear, RMSNorm, Table, Weights
from gemfilter_jax.models.rope import rotary_table
from gemfilter_jax.ops import attention
from gemfilter_jax.ops.attention import TriShape
from gemfilter_jax.ops.precision import precision_of
from gemfilter_jax.parallel import collectives, shards

_ALL = 2**30  # the window of a layer without one: wider than any prompt


class Decoder(nnx.Module):
    """A decoder-only language model. A pytree: pass it to `jax.jit`, map over it, shard it.

    Attributes:
      attention_implementation: of prompts' attention, see `attention.causal`; static.
      mesh: the devices that hold the weights, as `sharding.RULES` has it, None for one; static. The methods run on
        whole weights, or inside `collectives.shard_map` on one device's part of them.

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
        self.int8_products = False
        self.attention_implementation: str | None = None
        self.mesh: jax.sharding.Mesh | None = None
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
        layer = jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, index, keepdims=False), self.layers)
        layer.keep_own_key_head(self.config.kv_heads)
        if self.int8_products:
            layer.multiply_in_int8()
        return layer

    def in_int8(self) -> "Decoder":
        """The same model, whose layers multiply matrices in int8.

        Weights have a scale for each output and activations one for each token; sums are int32, all else is as before.
        Weights that are not held as int8 are rounded layer by layer, as they are used.
        """
        model = jax.tree.map(lambda p: p, self)
        model.int8_products = True
        return model

    def _window(self, index: jax.typing.ArrayLike) -> jax.Array | int | None:
        """The sliding window of layer `index`, which may be traced; a number where all layers have the same."""
        if self.config.sliding_windows is None:
            return None
        if len(set(self.config.sliding_windows)) == 1:
            return self.config.sliding_windows[0]
        return jnp.asarray([window or _ALL for window in self.config.sliding_windows], jnp.int32)[index]

    def _through(
        self, index: jax.typing.ArrayLike, x: jax.Array, table: Table, lengths: jax.Array, pattern: TriShape | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A prompt through layer `index`: the next layer's x [B, S, D], and this one's keys and values [B, S, G, E]."""
        with jax.named_scope("layer"):
            layer = self.layer(index)
            rows = x.shape[1] if collectives.axis_size("seq") > 1 else collectives.pmax(jnp.max(lengths), "data")
            q, k, v = layer.open(x, table, rows)
            attended = attention.causal(
                q,
                k,
                v,
                lengths=lengths,
                window=self._window(index),
                pattern=pattern,
                implementation=self.attention_implementation,
            )
            return layer.close(x, attended, rows), k, v

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
        table = self._table(ids, lengths, pattern)

        def body(index, x):
            return self._through(index, x, table, lengths, pattern)[0]

        return jax.lax.fori_loop(0, layers, body, self._embedded(ids))

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
        return self._view(layer, x, lengths, window, pattern)

    def _view(
        self,
        index: jax.typing.ArrayLike,
        x: jax.Array,
        lengths: jax.Array,
        window: int,
        pattern: TriShape | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What `keys_and_last_queries` returns, from the x [B, S, D] that enters layer `index`."""
        with jax.named_scope("filter_layer"):
            layer = self.layer(index)
            k = layer.keys(layer.attention_norm(x), self._table(x, lengths, pattern))
            rows = lengths[:, None] - window + jnp.arange(window)
            x_rows = shards.cut(mirrored=pattern is None).rows(x, rows)
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
        table = self._table(ids, lengths, pattern)

        def body(x, index):
            seen = look(*self._view(index, x, lengths, window, pattern))
            return self._through(index, x, table, lengths, pattern)[0], seen

        return jax.lax.scan(body, self._embedded(ids), jnp.arange(layers))[1]

    def read(
        self, ids: jax.Array, lengths: jax.Array, extents: jax.Array, layer: int, pattern: TriShape | None = None
    ) -> FilterState:
        """What the filter at `layer` needs of the beginnings of prompts.

        Args:
          ids: [B, S], the beginnings. lengths: [B], theirs. extents: [B], those of the whole prompts.
          pattern: of attention, None for dense.
        """
        table = self._table(ids, extents, pattern)

        def body(x, index):
            x, k, v = self._through(index, x, table, lengths, pattern)
            return x, (k, v)

        x, (keys, values) = jax.lax.scan(body, self._embedded(ids), jnp.arange(layer))
        last = self.layer(layer)
        return FilterState(keys, values, last.keys(last.attention_norm(x), table), lengths)

    def keys_and_last_queries_after(
        self, state: FilterState, ids: jax.Array, lengths: jax.Array, window: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `keys_and_last_queries`, of prompts whose beginnings have been read.

        Args:
          state: of B beginnings. ids: [B, T], what follows them. lengths: [B], how much of it.

        Returns:
          q [B, W, H, E], k [B, S + T, G, E] and rows [B, W], -1 for those before `ids`; k's first entries are the
          beginning's and what follows it.
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
        x, _ = jax.lax.scan(body, self._embedded(ids), stacked)
        last = self.layer(len(state.keys))
        normed = last.attention_norm(x)
        k = state.followed(state.last_keys, last.keys(normed, table))
        observed = lengths[:, None] - window + jnp.arange(window)
        q = jnp.take_along_axis(last.queries(normed, table), jnp.maximum(observed, 0)[..., None, None], axis=1)
        return q, k, jnp.where(observed < 0, -1, state.lengths[:, None] + observed)

    def _embedded(self, ids: jax.Array) -> jax.Array:
        """[...] -> [..., D]."""
        table = self.embedding[...]
        if len(table) == self.config.vocab:
            return table[ids]
        own = ids - collectives.axis_index("model") * len(table)
        here = (own >= 0) & (own < len(table))
        return collectives.psum(jnp.where(here[..., None], table[jnp.where(here, own, 0)], 0), "model")

    def _table(self, tokens: jax.Array, lengths: jax.Array, pattern: TriShape | None) -> Table:
        """The rotary table of prompts that begin at position 0, of this device's part of ids or x [B, S, ...]."""
        positions = shards.cut(mirrored=pattern is None).positions(tokens.shape[1])
        return rotary_table(self.config, positions[None], lengths)

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

        x, cache = jax.lax.fori_loop(0, self.config.layers, body, (self._embedded(ids), cache))
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

        x, cache = jax.lax.fori_loop(0, self.config.layers, body, (self._embedded(ids[:, None]), cache))
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
                # The embedding first: as the second factor, transposed, a CPU takes four times as long for one row.
                table, precision = self.embedding[...], precision_of(normed)
                products = jnp.tensordot(
                    table, normed, (1, -1), precision=precision, preferred_element_type=jnp.float32
                )
                logits = jnp.moveaxis(products, 0, -1)
            else:
                logits = self.lm_head(normed, result=jnp.float32)
            whole = logits.shape[-1] == self.config.vocab
            return logits if whole else collectives.all_gather(logits, "model", logits.ndim - 1)
