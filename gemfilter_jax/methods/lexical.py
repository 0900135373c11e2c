"""How much a passage and a question have in common, by their words."""

import functools
import logging
from collections.abc import Sequence

import bm25s
import numpy as np
import Stemmer
from bm25s.stopwords import STOPWORDS_EN_PLUS

_OF_NEIGHBOURS = 0.3  # an answer often stands beside the sentence that names what was asked for


def bm25(passages: Sequence[str], question: str, *, stems: bool = False) -> np.ndarray:
    """float32 [P], BM25 of each passage as a document, by the library `bm25s` at its defaults.

    Words are lower-cased runs of letters and digits; a text without spaces, as in Chinese, therefore has few.

    Args:
      stems: compare English stems, and ignore English function words in the question.
    """
    *corpus, asked = bm25s.tokenize(
        [*passages, question],
        token_pattern=r"[^\W_]+",
        stopwords=[],
        return_ids=False,
        show_progress=False,
    )
    if stems:
        asked = [word for word in asked if word not in _function_words()]
        stemmer = Stemmer.Stemmer("english")
        *corpus, asked = (stemmer.stemWords(words) for words in (*corpus, asked))
    known = set().union(*corpus)
    asked = [word for word in asked if word in known]
    if not asked:
        return np.zeros(len(passages), np.float32)
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells of every index that it builds
    index = bm25s.BM25()
    index.index(corpus, show_progress=False)
    return index.get_scores(asked)


def scores(passages: Sequence[str], question: str) -> np.ndarray:
    """float32 [P], BM25 by stems of each passage of a document, in order, and a part of that of the ones beside it."""
    own = bm25(passages, question, stems=True)
    beside = np.pad(own, 1)
    return own + _OF_NEIGHBOURS * (beside[:-2] + beside[2:])


@functools.cache
def _function_words() -> frozenset[str]:
    return frozenset(STOPWORDS_EN_PLUS)
