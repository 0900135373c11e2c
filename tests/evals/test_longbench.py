"""LongBench: prompts and scores as published, files with mistakes, and texts that look like placeholders."""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
import sys

import pytest

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals import longbench_metrics
from gemfilter_jax.evals.tasks import longbench
from gemfilter_jax.evals.tasks.longbench import LongBench
from gemfilter_jax.text import prompt

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "longbench_pairs.json").read_text("utf-8"))
PUBLISHED = {
    "narrativeqa": ("aada7ed24b06abac", 128, "qa_f1"),
    "qasper": ("0fbdd123fe7f83d6", 128, "qa_f1"),
    "multifieldqa_en": ("20b4666a2de8a1f7", 64, "qa_f1"),
    "multifieldqa_zh": ("344b3a4e557cd547", 64, "qa_f1_zh"),
    "hotpotqa": ("9ec4ae308865bd0c", 32, "qa_f1"),
    "2wikimqa": ("9ec4ae308865bd0c", 32, "qa_f1"),
    "musique": ("9ec4ae308865bd0c", 32, "qa_f1"),
    "dureader": ("ae53329f51b17908", 128, "rouge_l_zh"),
    "gov_report": ("91c25d585b189ced", 512, "rouge_l"),
    "qmsum": ("dca23b678fe0183b", 512, "rouge_l"),
    "multi_news": ("2af3f28c40b902e6", 512, "rouge_l"),
    "vcsum": ("3e5d8241bc9b512e", 512, "rouge_l_zh"),
    "trec": ("0eff8bebdba99d91", 64, "classification"),
    "triviaqa": ("00a802e6377e72fc", 32, "qa_f1"),
    "samsum": ("a68d884234907eef", 128, "rouge_l"),
    "lsht": ("f3edabdf7fae53d6", 64, "classification"),
    "passage_count": ("986550b6c61009c6", 32, "count"),
    "passage_retrieval_en": ("39b96b7fa52bdd2a", 32, "retrieval"),
    "passage_retrieval_zh": ("c1e2346e245eb365", 32, "retrieval_zh"),
    "lcc": ("6a1f24cf0bb83cd9", 64, "code_similarity"),
    "repobench-p": ("ee9ec182ea5ffeb7", 64, "code_similarity"),
}
"""Start of the SHA-256 of the published prompt, the published length of answers, and the metric by dataset."""

PLAIN = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
FIRST_LINE = {"trec", "triviaqa", "samsum", "lsht"}
CHINESE = {"multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"}
ASKS_NOTHING = ["gov_report", "multi_news", "vcsum", "passage_count", "lcc"]
ENGLISH = set(PUBLISHED) - CHINESE - {"lcc", "repobench-p"}
HOSTILE = "{text} {question} {context} {input} {0} {} </text>"
ANSWERS = {"passage_retrieval_en": "Paragraph 1", "passage_retrieval_zh": "段落1"}

every_dataset = pytest.mark.parametrize("name", PUBLISHED)


def fields(name: str, **changes) -> dict:
    """The fields of a line as published."""
    return {
        "input": "Who?",
        "context": "Ada did.",
        "answers": [ANSWERS.get(name, "Ada")],
        "length": 2,
        "dataset": name,
        "language": "en",
        "all_classes": ["Ada", "Bob"] if name in ("trec", "lsht") else None,
        "_id": "1f",
    } | changes


def written(path: pathlib.Path, *lines: dict | str) -> str:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), "utf-8")
    return str(path)


def one_example(tmp_path, tokenizer, name: str, truncate: int | None = None, **changes):
    data = written(tmp_path / f"{name}.jsonl", fields(name, **changes))
    (example,) = LongBench(data=data, truncate=truncate).examples(tokenizer, 0)
    return example


def whole_prompt(example) -> str:
    """The prompt of an example, from the parts that a pipeline joins."""
    before, after = example.message_format.split("{text}{question}")
    assert after == ""
    return f"{before}{example.text}{example.question}"


def test_datasets_are_the_published_ones():
    datasets = longbench.load()
    found = {
        name: (hashlib.sha256(one.prompt.encode()).hexdigest()[:16], one.new_tokens, one.metric)
        for name, one in datasets.items()
    }
    assert found == PUBLISHED
    assert {name for name, one in datasets.items() if one.plain} == PLAIN
    assert {name for name, one in datasets.items() if one.first_line} == FIRST_LINE
    assert {name for name, one in datasets.items() if one.language == "zh"} == CHINESE
    assert {name for name, one in datasets.items() if one.language == "en"} == ENGLISH
    assert len(ENGLISH) == 14
    prompt_of_code = "Please complete the code given below. \n{context}{input}Next line of code:\n"
    assert datasets["repobench-p"].prompt == prompt_of_code


@pytest.mark.parametrize(
    ("name", "asked"),
    [*itertools.product(PUBLISHED, ["Who did it?", HOSTILE]), *((name, "") for name in ASKS_NOTHING)],
)
def test_prompts_are_the_published_ones(tmp_path, tokenizer, name, asked):
    published, context = longbench.load()[name].prompt, f"Ada did.\n{HOSTILE}"
    example = one_example(tmp_path, tokenizer, name, input=asked, context=context)
    expected = published.format(context=context, input=asked)
    assert whole_prompt(example) == expected
    assert example.plain == (name in PLAIN)
    assert example.message_format
    assert example.message_format.count("{") == 2  # no placeholder but the two, whatever the line holds
    made = prompt.encode(
        tokenizer,
        example.text,
        example.question,
        observation_rows=1,
        chat_template=False,
        message_format=example.message_format,
    )
    assert tokenizer.decode(made.ids) == expected
    assert made.text == context


@every_dataset
def test_answers_are_scored_as_published(tmp_path, tokenizer, name):
    example, seen = one_example(tmp_path, tokenizer, name), set()
    task = LongBench(data=str(tmp_path), datasets=name)
    assert task.new_tokens(example) == PUBLISHED[name][1]
    for answer, references, classes, percent in GOLDEN["datasets"][name]:
        asked = dataclasses.replace(example, references=tuple(references), classes=tuple(classes or ()))
        scores = task.score(asked, answer)
        assert list(scores) == ["score"]
        assert 100 * scores["score"] == pytest.approx(percent, abs=0.005_001)
        seen.add(percent)
    assert len(seen) > 1


def test_examples_of_a_line(tmp_path, tokenizer):
    example = one_example(tmp_path, tokenizer, "trec", answers=["Ada", "Bob"])
    assert example.name == "trec 1"
    assert example.group == "trec"
    assert example.text == "Ada did."
    assert example.question == "\nWho?"
    assert example.references == ("Ada", "Bob")
    assert example.classes == ("Ada", "Bob")
    assert example.tokens == len(tokenizer("Ada did.", add_special_tokens=False)["input_ids"])
    assert one_example(tmp_path, tokenizer, "hotpotqa", all_classes=["x"]).classes == ()


def test_a_folder(tmp_path, tokenizer):
    for name in ("musique", "hotpotqa", "lcc", "vcsum"):
        written(tmp_path / f"{name}.jsonl", *(fields(name, context=f"{name} {n}.") for n in range(3)))
    written(tmp_path / "hotpotqa_e.jsonl", "not read")
    data = str(tmp_path)

    def names(**options) -> list[str]:
        return [one.name for one in LongBench(data=data, **options).examples(tokenizer, 0)]

    assert names() == [f"{name} {n}" for name in ("hotpotqa", "musique") for n in (1, 2, 3)]
    assert names(count=2) == ["hotpotqa 1", "hotpotqa 2", "musique 1", "musique 2"]
    assert names(datasets="lcc, hotpotqa,lcc", count=1) == ["lcc 1", "hotpotqa 1"]
    assert names(datasets="vcsum", count=1) == ["vcsum 1"]


def test_one_file(tmp_path, tokenizer):
    lines = [fields("musique"), fields("lcc", input=""), fields("musique", context="Bob did.\u2028He said so.")]
    data = written(tmp_path / "all.jsonl", *(json.dumps(line, ensure_ascii=False) for line in lines), "", "  ")

    def made(**options) -> list[tuple[str, str]]:
        return [(one.name, one.text) for one in LongBench(data=data, **options).examples(tokenizer, 0)]

    second = ("musique 2", "Bob did.\u2028He said so.")
    assert made() == [("musique 1", "Ada did."), ("lcc 1", "Ada did."), second]  # adjacent: the same text
    assert made(datasets="lcc") == [("lcc 1", "Ada did.")]
    assert made(datasets="musique", count=1) == [("musique 1", "Ada did.")]
    with pytest.raises(UserError, match=re.escape("all.jsonl: contains no example of qasper")):
        made(datasets="musique,qasper")


def test_the_file_names_the_dataset_where_lines_do_not(tmp_path, tokenizer):
    line = fields("any")
    del line["dataset"]
    (example,) = LongBench(data=written(tmp_path / "qasper_e.jsonl", line)).examples(tokenizer, 0)
    assert example.group == "qasper"
    (example,) = LongBench(data=written(tmp_path / "other.jsonl", fields("qmsum_e"))).examples(tokenizer, 0)
    assert example.group == "qmsum"


def test_questions_about_one_text_are_adjacent(tmp_path, tokenizer):
    texts = ["A b.", "C d.", "A b.", "E f.", "C d."]
    data = written(tmp_path / "qasper.jsonl", *(fields("qasper", context=text, input=f"{n}?") for n, text in
                                                enumerate(texts)))  # fmt: skip
    made = list(LongBench(data=data).examples(tokenizer, 0))
    assert [one.name for one in made] == [f"qasper {n}" for n in (1, 3, 2, 5, 4)]
    assert [one.text for one in made] == sorted(texts)


def as_published(tokenizer, whole: str, tokens: int) -> str:
    """The prompt that LongBench's pred.py makes."""
    ids = tokenizer(whole, truncation=False).input_ids
    if len(ids) <= tokens:
        return whole
    half = int(tokens / 2)
    return tokenizer.decode(ids[:half], skip_special_tokens=True) + tokenizer.decode(
        ids[-half:], skip_special_tokens=True
    )


TALE = " ".join(f"Chapter {n} tells of {n * n} ships." for n in range(40))
CODE = "ship = harbour[7]\n" * 20


@pytest.mark.parametrize(
    ("name", "context", "asked"),
    [
        ("narrativeqa", TALE, "Which chapter tells of 49 ships?"),
        ("repobench-p", TALE, CODE),
        ("repobench-p", "harbour = ships()\n", CODE),
    ],
)
@pytest.mark.parametrize("truncate", [100, 130, 131, 10_000])
def test_the_middle_is_cut_as_published(tmp_path, tokenizer, name, context, asked, truncate):
    uncut = longbench.load()[name].prompt.format(context=context, input=asked)
    example = one_example(tmp_path, tokenizer, name, input=asked, context=context, truncate=truncate)
    assert whole_prompt(example) == as_published(tokenizer, uncut, truncate)
    assert (whole_prompt(example) == uncut) == (truncate == 10_000)
    assert example.tokens == len(tokenizer(example.text)["input_ids"])


@pytest.mark.parametrize(("name", "truncate"), [("qasper", 60), ("trec", 20)])
def test_a_prompt_is_not_cut_to_its_instructions(tmp_path, tokenizer, name, truncate):
    said = f"truncate is {truncate}: too little is left of the prompt of {name} 1; give more"
    with pytest.raises(UserError, match=re.escape(said)):
        one_example(tmp_path, tokenizer, name, context="Ada did. " * 90, truncate=truncate)


def without(name: str, field: str) -> dict:
    return {key: value for key, value in fields(name).items() if key != field}


@pytest.mark.parametrize(
    ("file", "line", "found", "expected"),
    [
        ("musique", without("musique", "input"), "field 'input' is missing", "expected a string"),
        ("musique", without("musique", "context"), "field 'context' is missing", "expected a string"),
        ("musique", without("musique", "answers"), "field 'answers' is missing", "expected a list of strings"),
        ("musique", fields("musique", input=None), "field 'input' is None", "expected a string"),
        ("trec", fields("trec", input=" "), "field 'input' is ' '", "expected a string that is not empty"),
        ("musique", fields("musique", input="\ud800?"), "'input' has half of a surrogate pair", "expected UTF-8"),
        ("musique", fields("musique", context=""), "field 'context' is ''", "expected a string that is not empty"),
        ("musique", fields("musique", context=["a"]), "field 'context' is ['a']", "expected a string"),
        ("musique", fields("musique", answers="Ada"), "field 'answers' is 'Ada'", "expected a list of strings"),
        ("musique", fields("musique", answers=[]), "field 'answers' is []", "expected a list of strings"),
        ("musique", fields("musique", answers=[7]), "field 'answers' is [7]", "expected a list of strings"),
        ("musique", fields("sudoku"), "field 'dataset' is 'sudoku'", "expected one of narrativeqa, qasper, "),
        ("musique", fields("musique", dataset=7), "field 'dataset' is 7", "expected a string"),
        (
            "other",
            without("musique", "dataset"),
            "missing, and the file's name is 'other'",
            "expected one of narrativeqa",
        ),
        ("trec", fields("trec", all_classes=None), "field 'all_classes' is None", "expected a list of strings"),
        ("trec", without("trec", "all_classes"), "field 'all_classes' is missing", "expected a list of strings"),
        ("trec", fields("trec", all_classes=["a", ""]), "item 2 of 'all_classes' is ''", "expected a string"),
        ("passage_retrieval_en", fields("passage_retrieval_en", answers=["7"]), "is ['7']", r"'Paragraph (\\d+)'"),
        ("musique", '{"input": "Who?"', "is not JSON", "expected an example as a JSON object"),
        ("musique", "[" * 100_000, "is not JSON", "expected an example as a JSON object"),
        ("musique", '["input"]', "is ['input']", "expected an example as a JSON object"),
    ],
)
def test_a_wrong_line_is_told(tmp_path, file, line, found, expected):
    good = fields("trec" if file == "other" else file)
    path = written(tmp_path / f"{file}.jsonl", good, "", line, good)
    with pytest.raises(UserError) as caught:
        LongBench(data=path)
    said = str(caught.value)
    assert said.startswith(f"{path}, line 3: ")
    assert found in said
    assert expected in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "data is not given; expected a folder"),
        ({"data": "{folder}/nowhere"}, "nowhere: cannot be read (No such file or directory)"),
        ({"data": "{folder}/no\0where"}, "where: cannot be read"),
        ({"data": "{folder}/empty.jsonl"}, "empty.jsonl: is empty"),
        ({"data": "{folder}"}, "contains none of the files narrativeqa.jsonl, qasper.jsonl"),
        ({"data": "{folder}", "datasets": "qasper"}, "qasper.jsonl: cannot be read (No such file or directory)"),
        ({"data": "{folder}", "datasets": "qasper,sudoku"}, "'sudoku' is unknown; one of narrativeqa, qasper, "),
        ({"data": "{folder}", "datasets": ""}, "'' is unknown; one of narrativeqa"),
        ({"data": "{folder}", "count": 0}, "count is 0: expected a number in [1, 100000]"),
        ({"data": "{folder}", "truncate": 1}, "truncate is 1: expected a number of at least 2"),
    ],
)
def test_a_wrong_option_is_told(tmp_path, options, said):
    (tmp_path / "empty.jsonl").write_text("\n")
    given = {name: value.format(folder=tmp_path) if name == "data" else value for name, value in options.items()}
    with pytest.raises(UserError, match=re.escape(said)):
        LongBench(**given)


def test_jieba_is_asked_for_where_it_is_needed(tmp_path, monkeypatch):
    for name in ("dureader", "multifieldqa_zh", "lsht"):
        written(tmp_path / f"{name}.jsonl", fields(name))
    monkeypatch.setitem(sys.modules, "jieba", None)
    assert LongBench(data=str(tmp_path), datasets="lsht")
    with pytest.raises(UserError) as caught:
        LongBench(data=str(tmp_path), datasets="multifieldqa_zh,lsht,dureader")
    said = "datasets multifieldqa_zh, dureader need jieba; run `pip install gemfilter-jax[evals]`"
    assert str(caught.value) == said
    assert not longbench_metrics.can_be_computed("rouge_l_zh")
