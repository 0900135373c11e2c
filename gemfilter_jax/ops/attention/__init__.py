"""Attention. Axes as in `models.transformer`; no implementation makes an S x S array."""

import importlib

import jax

from gemfilter_jax.ops.attention.visibility import TriShape
from gemfilter_jax.ops.attention.xla import rows, to_cache
from gemfilter_jax.ops.dispatch import Dispatcher
from gemfilter_jax.parallel import collectives

__all__ = ["IMPLEMENTATIONS", "TriShape", "causal", "check_runs_here", "rows", "to_cache"]

IMPLEMENTATIONS = {"xla": None, "splash": "tpu", "cudnn": "gpu", "pallas": "gpu"}
"""Implementation (a module of this package) -> the only platform that runs it; None for all platforms."""

_DISPATCHER = Dispatcher("attention", IMPLEMENTATIONS, {"tpu": ("splash", "xla"), "gpu": ("cudnn", "pallas", "xla")})

check_runs_here = _DISPATCHER.check_runs_here


def causal(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    lengths: jax.Array,
    window: jax.typing.ArrayLike | None = None,
    pattern: TriShape | None = None,
    positions: jax.Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal self-attention of a right-padded prompt.

    A real row never sees padding, because padding lies to its right.

    Args:
      q: [B, S, H, E]. k, v: [B, S, G, E]. lengths: [B].
      window: the sliding window: how many positions a query sees, its own included; may be traced. None for no window.
      pattern: None for dense attention; `window` also limits a tri_shape.
      positions: int [B, S], increasing along a row; `window` counts these positions. None for 0 to S - 1.
      scale: factor of the inner products; None for E**-0.5.
      soft_cap: logits become soft_cap * tanh(logits / soft_cap) before they are masked; None for no cap.
      implementation: one of `IMPLEMENTATIONS`; None for the platform's first that supports the call. A program that
        shards prompts over a mesh's seq axis always uses XLA's.

    Returns:
      [B, S, H, E] in q's dtype; rows of padding are unspecified but finite.

    Raises:
      UserError: the named implementation, or every one, does not support the call; the message gives each reason.
    """
    sharded = collectives.axis_size("seq") > 1

    def serve(name: str) -> jax.Array:
        module = importlib.import_module(f"{__name__}.{'sharded' if sharded else name}")
        with jax.named_scope("attention"):
            return module.causal(
                q,
                k,
                v,
                lengths=lengths,
                window=window,
                pattern=pattern,
                positions=positions,
                scale=q.shape[-1] ** -0.5 if scale is None else scale,
                soft_cap=soft_cap,
            )

    return _DISPATCHER.first_that_serves(serve, "xla" if sharded else implementation)
