"""BM25 (Robertson et al. 1994)."""

import dataclasses
import logging
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
        import bm25s
        import numpy as np

        *corpus, question = bm25s.tokenize(
            [*passages, prompt.question],
            token_pattern=r"[^\W_]+",
            stopwords=[],
            return_ids=False,
            show_progress=False,
        )
        known = set().union(*corpus)
        asked = [word for word in question if word in known]
        if not asked:
            return np.zeros(len(passages), np.float32)
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells of every index that it builds
        index = bm25s.BM25()
        index.index(corpus, show_progress=False)
        return index.get_scores(asked)
