"""BM25 (Robertson et al. 1994)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from gemfilter_jax.methods.model_free import TextPassages

if TYPE_CHECKING:
    import numpy as np

    from gemfilter_jax.text.prompt import Prompt


@dataclasses.dataclass(frozen=True)
class BM25(TextPassages):
    """Keep the passages that share the rarest words with the question, by the library `bm25s` at its defaults.

    Words are lower-cased runs of letters and digits; a text without spaces, as in Chinese, therefore has few. Each
    passage counts as a document. The baseline that needs no model.
    """

    variants: ClassVar[Mapping[str, str]] = {"bm25": "passages that share words with the question, no model needed"}

    def scores(self, prompt: "Prompt", passages: "Sequence[str]") -> "np.ndarray":
        """See `TextPassages`."""
        from gemfilter_jax.methods import lexical

        return lexical.bm25(passages, prompt.question)
