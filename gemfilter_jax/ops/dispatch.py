"""Choice of an operation's implementation: the platform's first one that supports the call.

An implementation that does not support a call raises NotImplementedError with the reason. The next one is then tried.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TypeVar

from absl import logging

from gemfilter_jax.errors import UserError
from gemfilter_jax.parallel import collectives

_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Dispatcher:
    """The implementations of one operation.

    Attributes:
      operation: its name in messages and logs.
      platforms: implementation -> the only platform that runs it; None for all platforms.
      order: platform -> the implementations to try, in order; a platform that is not listed tries "xla".
    """

    operation: str
    platforms: Mapping[str, str | None]
    order: Mapping[str, tuple[str, ...]]

    def check_runs_here(self, implementation: str) -> None:
        """Check that an implementation runs on the traced program's platform, or on this process's if none is traced.

        Raises:
          NotImplementedError: it does not.
          UserError: there is no such implementation.
        """
        if implementation not in self.platforms:
            known = ", ".join(self.platforms)
            raise UserError(f"{self.operation} {implementation!r} is unknown; one of {known}")
        needed, present = self.platforms[implementation], collectives.platform()
        if needed not in (None, present):
            raise NotImplementedError(f"runs on {needed}, and this process has {present}")

    def first_that_serves(self, serve: Callable[[str], _Result], named: str | None = None) -> _Result:
        """The result of the first `serve(implementation)` that does not refuse the call; the choice is logged once.

        Args:
          named: the only implementation to try; None for the platform's list.

        Raises:
          UserError: every implementation refuses, each with its reason, or `named` is unknown.
        """
        names = self.order.get(collectives.platform(), ("xla",)) if named is None else (named,)
        refusals = {}
        for name in names:
            try:
                self.check_runs_here(name)
                result = serve(name)
            except NotImplementedError as error:
                refusals[name] = str(error)
            else:
                log_once(self.operation, name, tuple(refusals.items()))
                return result
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
        raise UserError(f"no implementation of {self.operation} serves: {reasons}")


def check_compute_capability(least: int) -> None:
    """Raise NotImplementedError if the traced program's GPU has a lower compute capability; an unknown one passes."""
    capability = collectives.compute_capability()
    major = (capability or str(least)).partition(".")[0]
    if not major.isdecimal() or int(major) < least:
        raise NotImplementedError(f"needs compute capability {least}.0, and the device has {capability}")


@functools.cache
def log_once(operation: str, chosen: str, refusals: tuple[tuple[str, str], ...]) -> None:
    """Log a choice the first time it is made."""
    logging.info("%s: %s", operation, chosen)
    for name, reason in refusals:
        logging.debug("%s: not %s: %s", operation, name, reason)
