"""The one door to attention. Axes as in `models.decoder`; no implementation behind it makes an S x S array.

An implementation raises NotImplementedError with the reason where it does not serve; the door then tries the next.
"""

import functools
import importlib

import jax
from absl import logging

from gemfilter_jax.errors import UserError
from gemfilter_jax.ops.attention import sharded
from gemfilter_jax.ops.attention.visibility import TriShape
from gemfilter_jax.ops.attention.xla import one_row, rows
from gemfilter_jax.parallel import collectives

__all__ = ["IMPLEMENTATIONS", "TriShape", "causal", "check_runs_here", "one_row", "rows"]

IMPLEMENTATIONS = {"xla": None, "splash": "tpu", "cudnn": "gpu"}
"""Implementation, a module of this package -> the only platform that runs it, None for all."""

_ORDER = {"tpu": ("splash", "xla"), "gpu": ("cudnn", "xla")}


def causal(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    lengths: jax.Array,
    window: jax.typing.ArrayLike | None = None,
    pattern: TriShape | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal self-attention of a right-padded prompt.

    A real row never sees padding, because padding lies to its right.

    Args:
      q: [B, S, H, E]. k, v: [B, S, G, E]. lengths: [B].
      window: how many keys a query sees, its own included, may be traced; None for all before it.
      pattern: None for dense attention; a tri_shape sees nothing beyond `window` either.
      implementation: one of `IMPLEMENTATIONS`; None for the first of the platform's that serves. Inside a program that
        cuts prompts over a mesh's seq axis XLA's serves, whatever the platform.

    Returns:
      [B, S, H, E] in q's dtype; rows of padding are unspecified but finite.

    Raises:
      UserError: the one that was named, or none at all, serves, with the reason of each.
    """
    if collectives.axis_size("seq") > 1:
        with jax.named_scope("attention"):
            return sharded.causal(q, k, v, lengths=lengths, window=window, pattern=pattern)
    names = _ORDER.get(collectives.platform(), ("xla",)) if implementation is None else (implementation,)
    refusals = {}
    for name in names:
        try:
            check_runs_here(name)
            serve = importlib.import_module(f"{__name__}.{name}").causal
            with jax.named_scope("attention"):
                out = serve(q, k, v, lengths=lengths, window=window, pattern=pattern)
        except NotImplementedError as error:
            refusals[name] = str(error)
        else:
            _tell(name, tuple(refusals.items()))
            return out
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    raise UserError(f"no attention serves: {reasons}")


def check_runs_here(implementation: str) -> None:
    """Whether an implementation runs where the program that is being traced will, or outside of one in this process.

    Raises:
      NotImplementedError: it does not.
      UserError: there is no such implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"attention {implementation!r} is unknown; one of {', '.join(IMPLEMENTATIONS)}")
    needed, present = IMPLEMENTATIONS[implementation], collectives.platform()
    if needed not in (None, present):
        raise NotImplementedError(f"runs on {needed}, and this process has {present}")


@functools.cache
def _tell(chosen: str, refusals: tuple[tuple[str, str], ...]) -> None:
    """Log a decision, the first time that it is made."""
    logging.info("attention: %s", chosen)
    for name, reason in refusals:
        logging.debug("attention: not %s: %s", name, reason)
