"""Needles: where they are hidden, what is asked and scored, and that the default model finds some of them.

The last tests are a small part of `gemfilter evaluate`, within the context and beyond it.
"""

import re

import pytest

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals import haystack
from gemfilter_jax.evals.tasks import needles
from gemfilter_jax.evals.tasks.needles import Needles

TOKENS = 600
OWN = {
    "needle": "The mill at Orrin grinds only on Fridays.",
    "question": "When does the mill grind?",
    "answer": "Friday",
}
PAPER_ANSWER = "eat a sandwich and sit in Dolores Park on a sunny day."


def essays(tokenizer, seed: int) -> str:
    return haystack.pile(tokenizer, haystack.built_in("essays"), TOKENS, seed).first(TOKENS)


def test_four_needles_at_three_depths(tokenizer):
    examples = list(Needles().examples(tokenizer, TOKENS))
    answers = ("marigold", "flowerpot", "47", "Kestrel")
    assert [example.name for example in examples] == [
        f"{one} at {depth}" for one in answers for depth in (0.1, 0.5, 0.9)
    ]
    for number, example in enumerate(examples):
        needle, ((start, end),) = needles.NEEDLES[number // 3], example.spans
        assert example.text[start:end] == needle.sentence
        assert example.text[:start] + example.text[end + 2 :] == essays(tokenizer, number // 3)
        assert example.text[end : end + 2] == "\n\n"
        assert example.text[start - 2 : start] in ("\n\n", "")
        assert (example.question, example.references) == (needle.question, (needle.answer,))
        assert (example.message_format, example.plain) == (None, False)


@pytest.mark.parametrize(
    ("count", "depths"), [(1, [0.0]), (2, [0.0, 1.0]), (5, [0.0, 0.25, 0.5, 0.75, 1.0]), (4, [0.0, 0.33, 0.67, 1.0])]
)
def test_depths_are_even_and_reach_both_ends(tokenizer, count, depths):
    examples = list(Needles(depth_count=count).examples(tokenizer, TOKENS))
    assert len(examples) == 4 * count
    assert [example.name for example in examples[:count]] == [f"marigold at {depth}" for depth in depths]
    hay, sentence = essays(tokenizer, 0), needles.NEEDLES[0].sentence
    assert examples[0].text == f"{sentence}\n\n{hay}"
    if count > 1:
        assert examples[count - 1].text == f"{hay}\n\n{sentence}"
    for depth, example in zip(depths, examples, strict=False):
        place = example.spans[0][0]
        assert place <= depth * len(hay) + 2
        assert "\n\n" not in hay[place : max(0, int(depth * len(hay)) - 2)]


@pytest.mark.parametrize("paper", [False, True])
def test_a_place_is_asked_for_once(tokenizer, paper):
    """101 depths of a short text are fewer places, which must not count as so many examples."""
    made = list(Needles(depth_count=101, paper=paper).examples(tokenizer, 300))
    assert 4 < len(made) < (1 if paper else 4) * 101
    assert len({(one.text, one.question) for one in made}) == len(made)
    assert made[0].name.endswith("at 0.0")


def test_the_papers_needle(tokenizer):
    task = Needles(paper=True)
    examples = list(task.examples(tokenizer, TOKENS))
    depths = [0, 0.11, 0.22, 0.33, 0.44, 0.56, 0.67, 0.78, 0.89, 1]  # np.round(np.linspace(0, 100, num=10)), in percent
    assert [float(example.name.rpartition(" ")[2]) for example in examples] == depths
    hay = essays(tokenizer, 0)
    needle = "\nThe best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.\n"
    for depth, example in zip(depths, examples, strict=True):
        before, after = example.text.split(needle)
        assert before + after == hay
        if depth < 1:
            assert before == "" or before[-1] == "."
            assert "." not in hay[len(before) : int(depth * len(hay))]
        else:
            assert after == ""
        ((start, end),) = example.spans
        assert example.text[start:end] == needle.strip()
        assert example.question == "What is the best thing to do in San Francisco?"
        assert example.plain
        assert task.new_tokens(example) == 50
        context = "CONTEXT"
        assert example.message_format.format(text=context, question=example.question) == (
            f"This is a very long story book: <book> {context} </book>.\n Based on the content of the book, Question: "
            "What is the best thing to do in San Francisco?\nAnswer:"
        )
    assert len(list(Needles(paper=True, depth_count=3).examples(tokenizer, TOKENS))) == 3


@pytest.mark.parametrize(
    ("answer", "right", "recall"),
    [
        (PAPER_ANSWER, 1, 11 / 12),  # the second "a" counts as missing
        ("Eat a SANDWICH in dolores park", 1, 6 / 12),
        ("Sit in Dolores Park on a sunny day.", 0, 8 / 12),
        ("a sandwich, and the park", 0, 3 / 12),  # "sandwich," is not "sandwich"
        ("", 0, 0),
    ],
)
def test_scores_of_the_papers_needle(tokenizer, answer, right, recall):
    task = Needles(paper=True)
    example = next(task.examples(tokenizer, TOKENS))
    assert task.score(example, answer) == {"right": right, "recall": pytest.approx(recall)}


@pytest.mark.parametrize(
    ("expected", "answer", "right", "recall"),
    [
        ("Friday", "On Fridays.", 1, 0),
        ("Friday", "It is FRIDAY!", 1, 1),
        ("the blue door", "A door, painted blue.", 0, 1),
        ("the blue door", "The blue house", 0, 0.5),
        ("the blue door", "Behind the blue door.", 1, 1),
        ("The", "the", 1, 1),
        ("Friday", "", 0, 0),
    ],
)
def test_scores_of_other_needles(tokenizer, written, expected, answer, right, recall):
    task = Needles(needles_file=written(OWN | {"answer": expected}))
    example = next(task.examples(tokenizer, TOKENS))
    assert task.score(example, answer) == {"right": right, "recall": recall}


def test_ones_own_needles_and_texts(tokenizer, written, tmp_path):
    paragraphs = [f"Paragraph {number} tells of nothing but the weather." for number in range(100)]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "book.txt").write_text("\n\n".join(paragraphs))
    long = {"needle": "Ann wrote it.", "question": "Who wrote it?", "answer": "Ann " * 50, "note": "is ignored"}
    task = Needles(needles_file=written(OWN, "", long), texts=str(tmp_path / "texts"))
    examples = list(task.examples(tokenizer, TOKENS))
    assert [(one.question, one.references) for one in examples[::3]] == [
        ("When does the mill grind?", ("Friday",)),
        ("Who wrote it?", ("Ann " * 50,)),
    ]
    for example in examples:
        hidden, *_ = (one.removesuffix(".") for one in (OWN["needle"], long["needle"]) if one in example.text)
        assert all(re.match(rf"Paragraph \d+|{hidden}", one) for one in example.text.split("\n\n")[:-1])
    assert [task.new_tokens(one) for one in examples] == [24] * 3 + [100] * 3
    assert len(examples[3].name) < 60


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([OWN, "{no"], "lines.jsonl, line 2: is not JSON"),
        ([OWN, "7"], "lines.jsonl, line 2: is 7, expected a needle as a JSON object"),
        (
            [OWN, {"needle": "x", "question": "y"}],
            "line 2: field 'answer' is missing, expected a string; the fields are",
        ),
        ([OWN | {"answer": 3}], "line 1: field 'answer' is 3, expected a string that is not empty"),
        ([OWN | {"needle": " "}], "line 1: field 'needle' is ' ', expected a string that is not empty"),
        ([OWN | {"needle": "\ud800"}], "line 1: field 'needle' has half of a surrogate pair at character 0"),
        ([""], "lines.jsonl: is empty, expected a needle as a JSON object on each line"),
    ],
)
def test_faults_of_a_needles_file(written, lines, said):
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        Needles(needles_file=written(*lines))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"needles_file": "no.jsonl"}, "no.jsonl: cannot be read (No such file or directory)"),
        ({"texts": "/no/folder"}, "/no/folder: is not a folder"),
        ({"paper": True, "needles_file": "no.jsonl"}, "paper has a needle of its own, but needles_file is given"),
        ({"paper": True, "needles": needles.NEEDLES}, "paper has a needle of its own, but needles is given"),
        ({"depth_count": -1}, "expected a number in [0, 101]"),
        ({"depth_count": 102}, "expected a number in [0, 101]"),
    ],
)
def test_settings_that_do_not_go_together(settings, said):
    with pytest.raises(UserError, match=re.escape(said)):
        Needles(**settings)


@pytest.mark.parametrize("which", [0, 3])
def test_facts_in_2048_tokens(smollm2, which):
    task = Needles(depths=(0.5,))
    example = list(task.examples(smollm2.checkpoint.tokenizer, 2048))[which]
    assert_kept_and_right(smollm2, task, example)


def test_a_fact_beyond_the_context(smollm2):
    task = Needles(depths=(0.3,))
    assert_kept_and_right(smollm2, task, next(task.examples(smollm2.checkpoint.tokenizer, 12_000)))


def assert_kept_and_right(model, task, example):
    result = model.generate(
        example.text, example.question, method=model.method(keep=512), max_new_tokens=task.new_tokens(example)
    )
    assert task.score_kept(example, result.selection) == {"kept": 1.0}
    assert task.score(example, result.text)["right"] == 1.0, result.text
