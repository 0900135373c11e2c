"""RULER's questions about documents: what the texts contain, answers, and files that are damaged."""

import collections
import functools
import json
import re

import pytest
from ruler_samples import spanned

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals.ruler import documents
from gemfilter_jax.evals.tasks.ruler import Ruler


@pytest.mark.parametrize("tokens", [900, 4_500])
def test_documents(make, tokens, squad, hotpot):
    paragraphs = {
        "qa_1": [one["context"] for article in squad["data"] for one in article["paragraphs"]],
        "qa_2": [f"{title}\n{''.join(text)}" for one in hotpot for title, text in one["context"]],
    }
    for subtask, own in paragraphs.items():
        places = []
        for example in make(subtask, tokens, count=8):
            shown = re.findall(r"Document (\d+):\n(.*?)(?=\n\nDocument|$)", example.text, re.DOTALL)
            assert [int(number) for number, _ in shown] == list(range(1, len(shown) + 1))
            assert "\n\n".join(f"Document {number}:\n{one}" for number, one in shown) == example.text
            others = [one for _, one in shown if one not in own]
            assert len(others) <= 1
            assert all(any(whole.startswith(one) for whole in own) for one in others)
            gold = spanned(example)
            assert all(example.text.count(one) == 1 for one in gold)
            assert set(gold) <= set(own)
            assert any(reference in one for reference in example.references for one in gold)
            places += [start / len(example.text) for start, _ in example.spans]
        assert len({example.question for example in make(subtask, tokens, count=8)}) == 8
        assert min(places) < 0.3
        assert max(places) > 0.5


def test_documents_of_the_same_article_come_first(make):
    for example in make("qa_1", 900, count=8):
        (gold,) = spanned(example)
        article = re.search(r"Town(\d)", gold)[1]
        documents = re.findall(rf"Town{article}\d has", example.text)
        assert len(documents) >= 4
        if len(documents) < 5:
            assert set(re.findall(r"Town(\d)", example.text)) == {article}


def test_documents_of_a_question_are_always_there(make):
    for example in make("qa_2", 900, count=8):
        number = re.search(r"question (\d)", example.question)[1]
        assert {int(one) for one in re.findall(rf"Title {number} (\d)", example.text)} == set(range(10))
        assert [one.split("\n")[0] for one in spanned(example)] == [f"Title {number} 1", f"Title {number} 6"]


def test_documents_that_are_used_up_are_repeated(make):
    for example in make("qa_1", 26_000, count=2):
        towns = collections.Counter(re.findall(r"Town(\d\d) has", example.text))
        assert len(towns) == 30
        (gold,) = re.findall(r"Town(\d\d) has", spanned(example)[0])
        assert towns.pop(gold) == 1
        assert min(towns.values()) >= 3
        assert max(towns.values()) - min(towns.values()) <= 2  # one more pass has begun; one paragraph may be cut


def test_answers_of_documents_are_alternatives(make, files):
    by_question = {example.question: example for example in make("qa_1", 900, count=60)}
    example = by_question["What has 12 towers? Answer:"]
    assert example.references == ("Town12", "has 12")
    assert len(by_question) == 60
    task = Ruler(subtasks="qa_1", qa_1_file=files["qa_1"])
    assert task.score(example, "It is town12, I think.") == {"right": 1.0}
    assert task.score(example, "It HAS 12 towers.") == {"right": 1.0}
    assert task.score(example, "Town 12") == {"right": 0.0}


def damaged(content, path: str, value) -> str:
    """A copy of JSON content with another value at a path such as "data/0/title"; None removes it."""
    copy = json.loads(json.dumps(content))
    *parents, last = [int(step) if step.isdecimal() else step for step in path.split("/")]
    owner = functools.reduce(lambda one, step: one[step], parents, copy)
    if value is None:
        del owner[last]
    else:
        owner[last] = value
    return json.dumps(copy)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("data", {}, "data is {}, expected a list (SQuAD v2.0)"),
        ("data", [], "contains no question with an answer, expected some (SQuAD v2.0)"),
        ("data/0/paragraphs", 3, "data[0].paragraphs is 3, expected a list (SQuAD v2.0)"),
        ("data/1/paragraphs/2/context", "  ", "data[1].paragraphs[2].context is '  ', expected a text (SQuAD v2.0)"),
        ("data/1/paragraphs/2/context", "\ud800", r"paragraphs[2].context is '\ud800', expected a text (SQuAD v2.0)"),
        ("data/0/paragraphs/0/qas/0/is_impossible", None, "expected an object with the field 'is_impossible' (SQuAD"),
        ("data/0/paragraphs/0/qas/0/is_impossible", "no", "is_impossible is 'no', expected true or false (SQuAD v2.0)"),
        ("data/0/paragraphs/0/qas/0/answers/1", "x", "answers[1] is 'x', expected an object with the field 'text'"),
        ("data/0/paragraphs/0/qas/0/question", " ", "data[0].paragraphs[0].qas[0].question is ' ', expected a text"),
        ("data/0/paragraphs/0/qas/0/answers", [], "qas[0].answers is [], expected one or more answers (SQuAD v2.0)"),
    ],
)
def test_damaged_files_of_squad_are_refused(squad, tmp_path, path, value, said):
    file = tmp_path / "squad.json"
    file.write_text(damaged(squad, path, value))
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        Ruler(subtasks="qa_1", qa_1_file=str(file))
    assert str(raised.value).startswith(f"{file}: ")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("3/answer", 7, "[3].answer is 7, expected a text (HotpotQA, distractor setting)"),
        ("3/context", {"title": []}, "[3].context is {'title': []}, expected a list (HotpotQA, distractor setting)"),
        ("3/context/1", ["only a title"], "[3].context[1] is ['only a title'], expected a list of two"),
        ("3/context/1/1/0", 5, "[3].context[1][1][0] is 5, expected a text"),
        ("3/supporting_facts", [["Elsewhere", 0]], "expected titles of 'context' (HotpotQA, distractor setting)"),
        ("3/question", None, "expected an object with the field 'question' (HotpotQA, distractor setting)"),
    ],
)
def test_damaged_files_of_hotpotqa_are_refused(hotpot, tmp_path, path, value, said):
    file = tmp_path / "hotpot.json"
    file.write_text(damaged(hotpot, path, value))
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        Ruler(subtasks="qa_2", qa_2_file=str(file))
    assert str(raised.value).startswith(f"{file}: ")
    assert "\n" not in str(raised.value)


def test_files_that_are_something_else_are_refused(files, hotpot, tmp_path):
    file = tmp_path / "file.json"
    with pytest.raises(UserError, match=re.escape(f"{file}: cannot be read (No such file or directory)")):
        documents.read_squad(file)
    file.write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        documents.read_squad(file)
    file.write_text("[1,")
    with pytest.raises(UserError, match=r"file\.json: is not JSON \(.*\), expected SQuAD v2\.0$"):
        documents.read_squad(file)
    file.write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"file\.json: is not JSON"):
        documents.read_hotpotqa(file)
    file.write_text(json.dumps(hotpot[:1]))
    with pytest.raises(UserError, match="contains no paragraphs besides those of one question"):
        documents.read_hotpotqa(file)
    with pytest.raises(UserError, match=r"the whole is \[.*\], expected an object with the field 'data' \(SQuAD"):
        Ruler(subtasks="qa_1", qa_1_file=files["qa_2"])
    with pytest.raises(UserError, match=r"the whole is \{.*\}, expected a list \(HotpotQA"):
        Ruler(subtasks="qa_2", qa_2_file=files["qa_1"])
