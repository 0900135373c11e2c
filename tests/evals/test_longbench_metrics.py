"""LongBench's metrics, against numbers of its own code in tests/golden/longbench_pairs.json."""

import json
import logging
import pathlib
import sys
import tempfile

import pytest

from gemfilter_jax.evals import longbench_metrics
from gemfilter_jax.evals.tasks import longbench

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "longbench_pairs.json").read_text("utf-8"))
PAIRS = 20


@pytest.mark.parametrize("metric", GOLDEN["metrics"])
def test_metrics_give_the_published_numbers(metric):
    pairs = GOLDEN["metrics"][metric]
    assert len(pairs) >= PAIRS
    assert len({expected for *_, expected in pairs}) > 3
    for answer, reference, classes, expected in pairs:
        assert longbench_metrics.score(metric, answer, reference, classes) == pytest.approx(expected, abs=1e-12), answer


def test_each_metric_of_the_datasets_has_numbers():
    assert {dataset.metric for dataset in longbench.load().values()} == set(GOLDEN["metrics"])


def test_rouge_of_sentences_that_the_package_fails_on():
    words = [f"w{number}" for number in range(2_000)]
    given, wanted = " ".join(words[:1_500]), " ".join(words)
    precision, recall = 1.0, 0.75
    assert longbench_metrics.rouge_l(given, wanted) == pytest.approx(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize("metric", ["retrieval", "retrieval_zh"])
def test_a_reference_without_a_paragraph_is_no_reference(metric):
    with pytest.raises(ValueError, match="names no paragraph"):
        longbench_metrics.score(metric, "7", "7")


def test_chinese_words_leave_no_file_and_no_message(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    longbench_metrics._tokenizer.cache_clear()
    assert longbench_metrics.qa_f1_zh("北京大学的研究生", "北京大学") == pytest.approx(0.5)
    assert list(tmp_path.iterdir()) == []
    assert not logging.getLogger("jieba").isEnabledFor(logging.INFO)


def test_only_chinese_metrics_need_jieba(monkeypatch):
    assert all(map(longbench_metrics.can_be_computed, GOLDEN["metrics"]))
    monkeypatch.setitem(sys.modules, "jieba", None)
    without = {metric for metric in GOLDEN["metrics"] if not longbench_metrics.can_be_computed(metric)}
    assert without == {"qa_f1_zh", "rouge_l_zh"}
