"""What a decoder predicts."""

import jax
import jax.numpy as jnp


@jax.jit
def top1_and_last_logits(model, ids):
    """The likeliest next token at every position, and all logits of the last, without handing out [S, V] logits."""
    x = model.hidden_states(ids[None], jnp.array([len(ids)]), model.config.layers)[0]
    logits = model.logits(x)
    return jnp.argmax(logits, axis=-1), logits[-1]
