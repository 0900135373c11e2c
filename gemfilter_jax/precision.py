"""The precision of matrix products."""

import jax
import jax.numpy as jnp


def precision_of(x: jax.Array) -> jax.lax.Precision | None:
    """The precision for products of x: full float32 for float32, whose factors accelerators would otherwise round."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
