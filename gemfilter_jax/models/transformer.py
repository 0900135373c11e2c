"""The decoder that all families share: pre-norm attention and gated-MLP layers stacked in one pytree.

Axes: B batch, S sequence, W observation rows, C cache capacity, L layers, D model width, H query heads,
G key/value heads, E head width, F MLP width, V vocabulary. Sequences are padded on the right; `lengths` [B] are the
true lengths. Norms, rotary, softmax and logits are computed in float32, everything else in the weights' dtype.

Layer weights carry a leading L axis, or each layer has arrays of its own, see `Decoder.unstacked`. Only
`Decoder.forward` loops over the layers, with a bound that may be traced. Callers pass it a hook that keeps, scores or
records data at each layer.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gemfilter_jax.config import ModelConfig
from gemfilter_jax.errors import UserError
from gemfilter_jax.models.cache import KVCache
from gemfilter_jax.models.hooks import Attend, Eviction, Hook, Visit
from gemfilter_jax.models.layer import ACTIVATIONS, DecoderLayer, Linear, RMSNorm, Table, Weights, replaced
from gemfilter_jax.models.rope import rotary_table
from gemfilter_jax.ops import attention
from gemfilter_jax.ops.attention import TriShape
from gemfilter_jax.parallel import collectives, sharding, shards
from gemfilter_jax.precision import precision_of

_ALL = 2**30  # the window of a layer without a sliding window: wider than any prompt


@jax.jit
def _each(stack: jax.Array) -> list[jax.Array]:
    return list(stack)


def keep_all(visit: Visit, cache: KVCache) -> KVCache:
    """The hook that writes all keys and values to the cache."""
    return cache.write(visit.layer, visit.k, visit.v)


class Decoder(nnx.Module):
    """A decoder-only language model. A pytree: pass it to `jax.jit`, map over it, shard it.

    Attributes:
      attention_implementation: for attention over prompts, see `attention.causal`; static.
      mesh: the devices that hold the weights, sharded by `sharding.partition`; None for one device; static. The methods
        run on whole weights, or inside `sharding.on_devices` on one device's shard of them.

    Args:
      dtype: of weights and activations.
      int8: hold all matrices but the embedding in symmetric int8, with a float32 scale per output channel.
      filter_layers: hold only this many layers and no LM head, enough for stage 1; None for the whole model.
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
        self.attention_implementation: str | None = None
        self.mesh: jax.sharding.Mesh | None = None
        self.int8_products = False
        self.held_layers = config.layers if filter_layers is None else filter_layers
        table = nnx.initializers.normal(0.02)(rngs.params(), (config.vocab, config.width), weights.dtype)
        self.embedding = nnx.Param(table, axes=("vocab", "embed"))
        self.layers: DecoderLayer | nnx.List[DecoderLayer] = jax.vmap(
            lambda key: DecoderLayer(config, weights=weights, rngs=nnx.Rngs(key))
        )(jax.random.split(rngs.params(), self.held_layers))
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

    @property
    def holds_int8(self) -> bool:
        """Whether matrices are held in int8."""
        return self.layer(0).query.scale is not None

    def layer(self, index: jax.typing.ArrayLike) -> DecoderLayer:
        """Layer `index`, which may be traced."""
        if isinstance(self.layers, DecoderLayer):
            layer = jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, index, keepdims=False), self.layers)
        elif isinstance(index, int):
            layer = self.layers[index]
        else:
            layer = jax.lax.switch(index, [functools.partial(lambda one: one, one) for one in self.layers])
        layer = sharding.gathered(layer, self.config).with_own_key_head(self.config.kv_heads)
        return layer.in_int8() if self.int8_products else layer

    def replace(
        self, *, mesh: jax.sharding.Mesh | None = None, attention_implementation: str | None = None
    ) -> "Decoder":
        """The same model on another mesh, or with another implementation of attention; None keeps the current one."""
        given = {"mesh": mesh, "attention_implementation": attention_implementation}
        return replaced(self, **{name: value for name, value in given.items() if value is not None})

    def unstacked(self) -> "Decoder":
        """The same model, each layer with arrays of its own, which decode steps read where they are.

        Slices of stacked arrays are copied before a product reads them, by XLA for GPUs at least. The arrays of this
        model are given up one by one, so that there is never a second copy of all of them.
        """
        stacks, structure = jax.tree.flatten(self.layers)
        layers: list[list[jax.Array]] = [[] for _ in range(self.held_layers)]
        for stack in stacks:
            for layer, own in zip(layers, _each(stack), strict=True):
                layer.append(own)
            stack.delete()
        return replaced(self, layers=nnx.List([jax.tree.unflatten(structure, layer) for layer in layers]))

    def in_int8(self) -> "Decoder":
        """The same model, whose layers multiply matrices in int8.

        Weights have one scale per output and activations one per token. Sums are int32; the rest is unchanged. Weights
        that are not stored in int8 are quantised layer by layer, when they are used.
        """
        return replaced(self, int8_products=True)

    def _window(self, index: jax.typing.ArrayLike) -> jax.Array | int | None:
        """The sliding window of layer `index`, which may be traced; a Python int if all layers have the same window."""
        if self.config.sliding_windows is None:
            return None
        if len(set(self.config.sliding_windows)) == 1:
            return self.config.sliding_windows[0]
        return jnp.asarray([window or _ALL for window in self.config.sliding_windows], jnp.int32)[index]

    def forward(
        self,
        x: jax.Array,
        table: Table,
        lengths: jax.Array,
        *,
        layers: jax.typing.ArrayLike,
        attend: Attend,
        hook: Hook | None = None,
        state: Any = None,
        start: int = 0,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Run layers. Prefill, prompts after a cached prefix, and decode steps all use this loop.

        Args:
          x: [B, S, D], the input of layer `start`. table: the rotary table of its positions.
          lengths: [B], number of real tokens in each row.
          layers: the layer to stop before; may be traced, so that one compiled program serves every number.
          attend: attention at a layer, see `among_themselves`.
          hook: called at each layer before attention; returns the new state.
          state: the hook's initial state.
          start: the first layer to run.
          positions: see `Visit`.

        Returns:
          The residual stream [B, S, D] that would enter the next layer, and the state.
        """
        whole = collectives.axis_size("seq") > 1 or x.shape[1] == 1
        rows = x.shape[1] if whole else collectives.pmax(jnp.max(lengths), "data")

        def body(index, carry):
            x, state = carry
            with jax.named_scope("layer"):
                layer = self.layer(index)
                q, k, v = layer.open(x, table, rows)
                visit = Visit(index, x, q, k, v, self._window(index), self.config.kv_heads, positions)
                state = state if hook is None else hook(visit, state)
                return layer.close(x, attend(visit, state), rows), state

        if x.shape[1] == 1 and not isinstance(self.layers, DecoderLayer) and isinstance(layers, int):
            carry = x, state
            for index in range(start, layers):
                carry = body(index, carry)
            return carry
        return jax.lax.fori_loop(start, layers, body, (x, state))

    def among_themselves(
        self, lengths: jax.Array, pattern: TriShape | None = None, positions: jax.Array | None = None
    ) -> Attend:
        """Attention within whole prompts: every token sees the tokens of its own prompt up to itself.

        Args:
          lengths: [B]. pattern: None for dense. positions: see `attention.causal`.
        """

        def attend(visit: Visit, _: Any) -> jax.Array:
            return attention.causal(
                visit.q,
                visit.k,
                visit.v,
                lengths=lengths,
                window=visit.sliding_window,
                pattern=pattern,
                positions=positions,
                implementation=self.attention_implementation,
            )

        return attend

    def embed(self, ids: jax.Array) -> jax.Array:
        """[...] -> [..., D]."""
        table = sharding.gathered(self.embedding, self.config)[...]
        if len(table) == self.config.vocab:
            return table[ids]
        own = ids - collectives.axis_index("model") * len(table)
        here = (own >= 0) & (own < len(table))
        return collectives.psum(jnp.where(here[..., None], table[jnp.where(here, own, 0)], 0), "model")

    def prompt_table(self, tokens: jax.Array, lengths: jax.Array, pattern: TriShape | None) -> Table:
        """The rotary table for this device's shard of ids or x [B, S, ...] of prompts that begin at position 0."""
        positions = shards.sequence_shards(mirrored=pattern is None).positions(tokens.shape[1])
        return rotary_table(self.config, positions[None], lengths)

    def prefill(
        self,
        ids: jax.Array,
        lengths: jax.Array,
        positions: jax.Array,
        cache: KVCache,
        *,
        gaps: bool = False,
        eviction: Eviction | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Run a prompt through all layers and fill an empty cache with it.

        Args:
          ids: [B, K]. lengths: [B]. positions: [B, K], the position of each token, increasing along a row.
          cache: with at least K slots, or as many as the eviction keeps.
          gaps: whether positions have gaps; sliding windows then count positions instead of tokens.
          eviction: which keys and values to keep; None for all.

        Returns:
          float32 logits [B, V] of each row's last real position, and the filled cache.
        """
        extents = jnp.take_along_axis(positions, (lengths - 1)[:, None], axis=1)[:, 0] + 1
        x = self.embed(ids)
        if eviction is None:
            x, cache = self._prefill_layers(x, positions, extents, lengths, hook=keep_all, state=cache, gaps=gaps)
            cache = cache.holding(positions, lengths)
        else:
            held = jnp.minimum(lengths, eviction.slots(ids.shape[1]))
            x, lengths, cache = self._prefill_evicting(x, positions, extents, lengths, cache, eviction, gaps)
            cache = cache.advanced_to(held)
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.logits(last), cache

    def _prefill_layers(
        self,
        x: jax.Array,
        positions: jax.Array,
        extents: jax.Array,
        lengths: jax.Array,
        *,
        hook: Hook,
        state: Any,
        gaps: bool,
        start: int = 0,
        stop: int | None = None,
    ) -> tuple[jax.Array, Any]:
        """`forward` for tokens at int positions [B, S] of prompts of `extents` [B] positions; None stops at the end."""
        counted = positions if gaps and self.config.sliding_windows else None
        return self.forward(
            x,
            rotary_table(self.config, positions, extents),
            lengths,
            start=start,
            layers=self.config.layers if stop is None else stop,
            attend=self.among_themselves(lengths, positions=counted),
            hook=hook,
            state=state,
            positions=counted,
        )

    def _prefill_evicting(
        self,
        x: jax.Array,
        positions: jax.Array,
        extents: jax.Array,
        lengths: jax.Array,
        cache: KVCache,
        eviction: Eviction,
        gaps: bool,
    ) -> tuple[jax.Array, jax.Array, KVCache]:
        """The residual stream [B, S or T, D] after the last layer, its lengths [B], and the filled cache."""

        def keep_some(lengths: jax.Array, positions: jax.Array) -> Hook:
            def hook(visit: Visit, cache: KVCache) -> KVCache:
                return cache.write_some(visit.layer, visit.k, visit.v, eviction.kept(visit, lengths), positions)

            return hook

        run = functools.partial(self._prefill_layers, extents=extents)
        keep_of_whole = keep_some(lengths, positions)
        propagation = eviction.propagation
        if propagation is None:
            x, cache = run(x, positions, lengths=lengths, hook=keep_of_whole, state=cache, gaps=gaps)
            return x, lengths, cache

        def keep_some_and_choose(visit: Visit, state: Any) -> Any:
            cache, chosen = state
            here = visit.layer == propagation.last_whole_layer
            chosen = jax.lax.cond(here, lambda: propagation.propagated(visit, lengths), lambda: chosen)
            return keep_of_whole(visit, cache), chosen

        after = propagation.last_whole_layer + 1
        slots = propagation.propagated_slots(x.shape[1])
        nothing = jnp.zeros((len(x), slots), jnp.int32), jnp.zeros_like(lengths)
        x, (cache, (chosen, counts)) = run(
            x,
            positions,
            lengths=lengths,
            hook=keep_some_and_choose,
            state=(cache, nothing),
            gaps=gaps,
            stop=after,
        )
        x = jnp.take_along_axis(x, chosen[..., None], axis=1, mode="fill", fill_value=0)
        positions = jnp.take_along_axis(positions, chosen, axis=1, mode="fill", fill_value=0)
        keep_of_chosen = keep_some(counts, positions)
        x, cache = run(x, positions, lengths=counts, hook=keep_of_chosen, state=cache, gaps=True, start=after)
        return x, counts, cache

    def decode_step(self, ids: jax.Array, positions: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """One decode step: ids [B] at positions [B] -> float32 logits [B, V] and the cache with the new tokens."""
        table = rotary_table(self.config, positions[:, None], positions + 1)
        lengths = cache.lengths + 1

        def append(visit: Visit, cache: KVCache) -> KVCache:
            return cache.append(visit.layer, visit.k, visit.v)

        def attend(visit: Visit, cache: KVCache) -> jax.Array:
            k, v, held = cache.layer(visit.layer)
            return attention.to_cache(visit.q, positions, k, v, key_positions=held, window=visit.sliding_window)

        x, cache = self.forward(
            self.embed(ids[:, None]),
            table,
            lengths,
            layers=self.config.layers,
            attend=attend,
            hook=append,
            state=cache.expecting(positions),
        )
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
                # The embedding comes first: as a transposed second factor, a CPU takes four times as long for one row.
                table, precision = self.embedding[...], precision_of(normed)
                products = jnp.tensordot(
                    table, normed, (1, -1), precision=precision, preferred_element_type=jnp.float32
                )
                logits = jnp.moveaxis(products, 0, -1)
            else:
                logits = self.lm_head(normed, result=jnp.float32)
            whole = logits.shape[-1] == self.config.vocab
            return logits if whole else collectives.all_gather(logits, "model", logits.ndim - 1)
