"""The precision of matrix products."""

import jax
import jax.numpy as jnp


def precision_of(x: jax.Array) -> jax.lax.Precision | None:
    """Of products of x: float32 means float32, where accelerators would otherwise round the factors down."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
