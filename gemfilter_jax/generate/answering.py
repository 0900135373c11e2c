"""How answers are generated, as a caller asks for it."""

import dataclasses
from collections.abc import Callable, Sequence

from gemfilter_jax.errors import UserError
from gemfilter_jax.generate import sampling
from gemfilter_jax.settings import Option, plain

MAX_NEW_TOKENS = Option("max_new_tokens", int, 128, "", at_least=1)
SEED = Option("seed", int, 0, "")


@dataclasses.dataclass(frozen=True)
class Answering:
    """How the answers of a batch are generated; see `Pipeline.generate`.

    Attributes:
      seeds: one for each row.
    """

    max_new_tokens: int
    sampling: sampling.Sampling
    seeds: Sequence[int]
    on_text: Callable[[str], None] | None = None

    def check(self) -> None:
        """Raise a `UserError` if a value is not what it should be."""
        MAX_NEW_TOKENS.check(self.max_new_tokens, f"max_new_tokens is {self.max_new_tokens!r}, ")
        sampling.check(self.sampling)
        for seed in self.seeds:
            SEED.check(plain(seed), f"seed is {seed!r}, ")
        if self.on_text is not None and not callable(self.on_text):
            raise UserError(f"on_text is of type {type(self.on_text).__name__}, expected a function")
