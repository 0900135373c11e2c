"""What a decoder computes on the way to its answers."""

import jax
import jax.numpy as jnp

from gemfilter_jax.models.transformer import Decoder
from gemfilter_jax.ops.attention import TriShape


def hidden_states(
    model: Decoder,
    ids: jax.Array,
    lengths: jax.Array,
    layers: jax.typing.ArrayLike,
    pattern: TriShape | None = None,
) -> jax.Array:
    """The residual stream [B, S, D] that enters layer `layers`, for ids [B, S]."""
    attend = model.among_themselves(lengths, pattern)
    table = model.prompt_table(ids, lengths, pattern)
    return model.forward(model.embed(ids), table, lengths, layers=layers, attend=attend)[0]


@jax.jit
def top1_and_last_logits(model, ids):
    """The likeliest next token at every position, and all logits of the last, without handing out [S, V] logits."""
    x = hidden_states(model, ids[None], jnp.array([len(ids)]), model.config.layers)[0]
    logits = model.logits(x)
    return jnp.argmax(logits, axis=-1), logits[-1]
