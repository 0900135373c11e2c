"""Choosing the next token from logits."""

import dataclasses

import jax
import jax.numpy as jnp

from gemfilter_jax.errors import UserError
from gemfilter_jax.settings import Option, plain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings. All fields are traced, so that changing them needs no new compilation.

    Attributes:
      temperature: 0 means greedy decoding.
      top_k: draw from this many likeliest tokens; 0 means all.
      top_p: draw from the fewest likeliest tokens that hold this share of the probability (Holtzman et al. 2020).
    """

    temperature: float | jax.Array = 0.0
    top_k: int | jax.Array = 0
    top_p: float | jax.Array = 1.0


GREEDY = Sampling()

_OPTIONS = (
    Option("temperature", float, 0.0, "", at_least=0, at_most=1e6),
    Option("top_k", int, 0, "", at_least=0),
    Option("top_p", float, 1.0, "", at_least=0, at_most=1),
)


def check(sampling: Sampling) -> None:
    """Raise a `UserError` if settings are no `Sampling` of numbers within their bounds."""
    if not isinstance(sampling, Sampling):
        raise UserError(f"sampling is of type {type(sampling).__name__}, expected a Sampling")
    for one in _OPTIONS:
        value = plain(getattr(sampling, one.name))
        one.check(value, f"{one.name} is {value!r}, ")


def sample(logits: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
    """Draw one token per row: float32 logits [B, V] and random keys [B] -> int32 [B]."""
    with jax.named_scope("sampling"):
        greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.lax.cond(
            jnp.asarray(sampling.temperature) > 0, lambda: _draw(logits, sampling, keys), lambda: greedy
        )


def _draw(logits: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
    vocab = logits.shape[-1]
    order = jnp.argsort(logits, axis=-1, descending=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1) / sampling.temperature
    top_k = jnp.where(jnp.asarray(sampling.top_k) > 0, sampling.top_k, vocab)
    ranked = jnp.where(jnp.arange(vocab) < top_k, ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    mass_before = jnp.cumsum(probability, axis=-1) - probability
    # The first token always stays. `<` also keeps the token that crosses top_p, as top-p sampling requires.
    allowed = (mass_before < sampling.top_p) | (jnp.arange(vocab) == 0)
    choice = jax.vmap(jax.random.categorical)(keys, jnp.where(allowed, ranked, -jnp.inf))
    return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
