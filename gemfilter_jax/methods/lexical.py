"""How much a passage and a question have in common, by their words.

`bm25s` is imported when it is used: what needs no words starts sooner without.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

_OF_NEIGHBOURS = 0.3  # an answer often stands beside the sentence that names what was asked for


def bm25(passages: Sequence[str], question: str, *, stems: bool = False) -> np.ndarray:
    """float32 [P], BM25 of each passage as a document, by the library `bm25s` at its defaults.

    Words are lower-cased runs of letters and digits; a text without spaces, as in Chinese, therefore has few.

    Args:
      stems: compare English stems, and ignore English function words in the question.
    """
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer("english") if stems else None
    words: Any = functools.partial(bm25s.tokenize, token_pattern=r"[^\W_]+", stopwords=[], show_progress=False)
    asked = words([question], return_ids=False)[0]
    if stemmer is not None:
        asked = stemmer.stemWords([word for word in asked if word not in _function_words()])
    corpus = words(list(passages), stemmer=stemmer)
    asked = [word for word in asked if word in corpus.vocab]
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
    from bm25s.stopwords import STOPWORDS_EN_PLUS

    return frozenset(STOPWORDS_EN_PLUS)
