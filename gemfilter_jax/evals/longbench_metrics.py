"""The metrics of LongBench (arXiv 2308.14508) of an answer against one reference, numbers from 0 to 1.

They give the numbers of https://github.com/THUDM/LongBench (LongBench/metrics.py, MIT licence), its oddities included,
with one exception: see `rouge_l`.
"""

import collections
import difflib
import functools
import importlib.util
import logging
import re
import string
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gemfilter_jax.evals import metrics

if TYPE_CHECKING:
    import jieba

_ROUGE_SMOOTHING = 1e-8
_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】"
    "〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)
_NUMBER = re.compile(r"\d+")
_NOT_CODE = ("`", "#", "//")

PARAGRAPHS = {"retrieval": re.compile(r"Paragraph (\d+)"), "retrieval_zh": re.compile(r"段落(\d+)")}
"""How a reference of a retrieval metric names its paragraph; each reference must match."""


def qa_f1_zh(answer: str, reference: str) -> float:
    """The F1 of the words that answer and reference share, in Chinese; punctuation is not counted. Needs jieba."""
    given, wanted = _plain_words(answer), _plain_words(reference)
    shared = sum((collections.Counter(given) & collections.Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted)) if shared else 0.0


def rouge_l(answer: str, reference: str) -> float:
    """The F1 of ROUGE-L at summary level, as the package rouge 1.0.1 computes it.

    Sentences end at full stops. Every sentence of the reference is compared with every sentence of the answer. The
    distinct words of their longest common subsequences are divided by the distinct words of each text.

    The package fails on sentences of about a thousand words, because it recurses for each word. LongBench then counts
    0; this function returns the true value.
    """
    given, wanted = _sentences(answer), _sentences(reference)
    if not given or not wanted:
        return 0.0
    shared = set[str]().union(*(_common(one, other) for one in wanted for other in given))
    precision = len(shared) / len(set[str]().union(*given))
    recall = len(shared) / len(set[str]().union(*wanted))
    return 2.0 * (precision * recall / (precision + recall + _ROUGE_SMOOTHING))


def rouge_l_zh(answer: str, reference: str) -> float:
    """`rouge_l` of Chinese texts. Needs jieba."""
    return rouge_l(" ".join(_words(answer)), " ".join(_words(reference)))


def classification(answer: str, reference: str, classes: Sequence[str]) -> float:
    """One divided by the number of classes that the answer names, if it names the reference; 0 otherwise.

    A class whose name is a part of the reference is not counted.
    """
    named = [one for one in classes if one in answer]
    for one in named:  # as published: the class after a removed one is skipped
        if one in reference and one != reference:
            named.remove(one)
    return 1 / len(named) if reference in named else 0.0


def retrieval(answer: str, reference: str) -> float:
    """The share of the answer's numbers that are the number of the reference, such as "Paragraph 7"."""
    return _retrieval("retrieval", answer, reference)


def retrieval_zh(answer: str, reference: str) -> float:
    """The share of the answer's numbers that are the number of the reference, such as "段落7"."""
    return _retrieval("retrieval_zh", answer, reference)


def count(answer: str, reference: str) -> float:
    """The share of the answer's numbers that are the reference, a number."""
    numbers = _NUMBER.findall(answer)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def code_similarity(answer: str, reference: str) -> float:
    """The similarity of the answer's first line of code to the reference, in whole hundredths.

    Lines with a backquote, "#" or "//" are not code. The similarity is that of fuzzywuzzy without python-Levenshtein:
    the ratio of Python's difflib.
    """
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in _NOT_CODE)), "")
    if line == reference:
        return 1.0
    if not line or not reference:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


_METRICS: dict[str, Callable[[str, str], float]] = {
    "qa_f1": metrics.token_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge_l": rouge_l,
    "rouge_l_zh": rouge_l_zh,
    "retrieval": retrieval,
    "retrieval_zh": retrieval_zh,
    "count": count,
    "code_similarity": code_similarity,
}
_NEED_JIEBA = ("qa_f1_zh", "rouge_l_zh")


def score(metric: str, answer: str, reference: str, classes: Sequence[str] = ()) -> float:
    """The score by the metric of this name; only "classification" uses the classes."""
    if metric == "classification":
        return classification(answer, reference, classes)
    return _METRICS[metric](answer, reference)


def can_be_computed(metric: str) -> bool:
    """Whether what the metric needs is installed."""
    return metric not in _NEED_JIEBA or importlib.util.find_spec("jieba") is not None


def _retrieval(metric: str, answer: str, reference: str) -> float:
    named = PARAGRAPHS[metric].search(reference)
    if named is None:
        raise ValueError(f"reference {reference!r} names no paragraph")
    return count(answer, named[1])


def _sentences(text: str) -> list[list[str]]:
    """The words of each sentence; the package counts a blank sentence as one empty word."""
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _common(reference: Sequence[str], answer: Sequence[str]) -> set[str]:
    """The words of a longest common subsequence. Of several, it is the one that the package finds."""
    lengths = [[0] * (len(answer) + 1)]
    for word in reference:
        above, row = lengths[-1], [0]
        for j, other in enumerate(answer):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        lengths.append(row)
    words, i, j = set(), len(reference), len(answer)
    while i and j:
        if reference[i - 1] == answer[j - 1]:
            i, j = i - 1, j - 1
            words.add(reference[i])
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def _plain_words(text: str) -> list[str]:
    """The words of a Chinese text in lower case, without punctuation and white space."""
    words = ("".join(word.lower().translate(_WITHOUT_PUNCTUATION).split()) for word in _words(text))
    return [word for word in words if word]


def _words(text: str) -> list[str]:
    return _tokenizer().lcut(text)


@functools.cache
def _tokenizer() -> "jieba.Tokenizer":
    import jieba

    jieba.setLogLevel(logging.WARNING)
    tokenizer: Any = jieba.Tokenizer()
    with tempfile.TemporaryDirectory() as folder:  # by default it reads a cache that any user of the machine may write
        tokenizer.tmp_dir = folder
        tokenizer.initialize()
    return tokenizer
