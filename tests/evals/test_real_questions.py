"""Questions of L-Eval's format: groups, places, joined documents, choices, scores, and faults of a file."""

import itertools
import json
import pathlib
import re

import pytest

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals.tasks import real_questions
from gemfilter_jax.evals.tasks.real_questions import RealQuestions
from gemfilter_jax.results import KeptText

FILE = str(pathlib.Path(__file__).parent / "task_files" / "real_questions.jsonl")
GROUPS = {
    "1.1": "verbatim",
    "1.2": "verbatim",
    "1.3": "other",  # "No" says nothing
    "1.4": "other",  # "harbour" stands there six times
    "1.5": "other",
    "2.1": "multiple choice",
    "2.2": "multiple choice",
    "3.1": "verbatim",
    "3.2": "verbatim",
}
OPTIONS = {"A": "The smallest one", "B": "The tall one in the corner", "C": "Both (A) and (B)", "D": "Plan B"}
PEOPLE = {"A": "Chelsea", "B": "Chelsea Clinton", "C": "John D. Smith.", "D": "No", "E": "7", "F": ""}


def document(text: str, *questions: tuple[str, str], **other) -> dict:
    return {
        "input": text,
        "instructions": [one for one, _ in questions],
        "outputs": [two for _, two in questions],
    } | other


def by_name(task: RealQuestions, tokenizer) -> dict[str, real_questions.QuestionOfOne]:
    return {one.name: one for one in task.examples(tokenizer, 0)}


def kept(text: str, *spans: tuple[int, int]) -> KeptText:
    return KeptText(text, 0, (), spans)


def test_groups_and_places(tokenizer):
    examples = by_name(RealQuestions(FILE), tokenizer)
    assert {name: one.group for name, one in sorted(examples.items())} == GROUPS
    inputs = [json.loads(line)["input"] for line in pathlib.Path(FILE).read_text().splitlines()]
    for name, one in examples.items():
        assert one.text == inputs[int(name[0]) - 1]
        assert one.tokens == len(tokenizer(one.text)["input_ids"])
        assert one.own == (0, len(one.text))
        assert len(one.spans) == (one.group == "verbatim")
    found = {name: one.text[slice(*one.spans[0])] for name, one in examples.items() if one.spans}
    assert found == {
        "1.1": "forty crates of lemons",
        "1.2": "Tilda Brook",
        "3.1": "9 in the morning",
        "3.2": "12 crowns for each visit",
    }
    assert examples["2.2"].question == "Where did Otto move? (A) Brassin (B) Velm (C) Nowhere"
    assert examples["2.2"].references == ("(A) Brassin",)


@pytest.mark.parametrize(
    ("text", "reference", "found"),
    [
        ("He must re - certify it. ", "RECERTIFY, it", ["re - certify it"]),
        ("relu,\nselu, tanh", "relu selu\ttanh.", ["relu,\nselu, tanh"]),
        ("the cat's “paw”", "cats paw", ["cat's “paw"]),
        ("no-one knows; nobody. No", "no", ["no", "No"]),
        ("the snowball", "now", []),
        ("snow ball now", "now", ["now"]),
        ("aa aa aa", "aa aa", ["aa aa"]),
        ("İstanbul is İstanbul", "i̇stanbul", ["İstanbul", "İstanbul"]),
        ("any ... text", "...", []),
        ("", "text", []),
    ],
)
def test_occurrences_are_whole_words_whatever_their_punctuation(text, reference, found):
    wanted = real_questions._Letters.of(reference).text
    assert [text[start:end] for start, end in real_questions._Letters.of(text).find(wanted)] == found


@pytest.mark.parametrize(("times", "group"), [(0, "other"), (1, "verbatim"), (5, "verbatim"), (6, "other")])
def test_references_that_stand_often_are_not_verbatim(tokenizer, written, times, group):
    text = "Where? " + "In the Attic! " * times
    (example,) = RealQuestions(written(document(text, ("Where?", "attic.")))).examples(tokenizer, 0)
    assert example.group == group


def test_joined_documents(tokenizer, written):
    texts = {number: f"Document {number} mentions the town of Velm and owl{number}." for number in range(1, 6)}
    lines = [document(f"\n{text} ", ("A?", f"owl{n}"), ("B?", "Velm")) for n, text in texts.items()]
    examples = list(RealQuestions(written(*lines), join=2, seed=3).examples(tokenizer, 0))
    groups = [list(own) for _, own in itertools.groupby(examples, key=lambda one: one.text)]
    assert [len(own) for own in groups] == [4, 4, 2]
    assert sorted(one.name for one in examples) == [f"{n}.{question}" for n in texts for question in (1, 2)]
    for own in groups:
        numbers = [int(one.name[0]) for one in own[::2]]
        assert own[0].text == "\n\n".join(texts[number] for number in numbers)
        for one in own:
            number = int(one.name[0])
            assert one.text[slice(*one.own)] == texts[number]
            ((start, end),) = one.spans
            assert one.text[start:end] == one.references[0]
            assert one.own[0] <= start < end <= one.own[1]
            assert one.tokens == len(tokenizer(one.text)["input_ids"])


def test_the_seed_draws_the_order(tokenizer, written):
    path = written(*(document(f"Text {number}.", ("Q?", "A")) for number in range(20)))
    orders = [[one.name for one in RealQuestions(path, seed=seed).examples(tokenizer, 0)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    assert [one.name for one in RealQuestions(path, count=7).examples(tokenizer, 0)] == orders[0][:7]


def test_lines_of_one_document_are_adjacent(tokenizer, written):
    lines = [document(text, ("Q?", "A"), source="x") for text in ("One.", "Two.", " One.", "Three.")]
    examples = list(RealQuestions(written(*lines, ""), join=1, seed=5).examples(tokenizer, 0))
    names = [one.name for one in examples]
    assert sorted(names) == ["1.1", "2.1", "3.1", "4.1"]
    assert names.index("3.1") == names.index("1.1") + 1


def test_scores_of_what_was_kept(tokenizer):
    task = RealQuestions(FILE, join=3)
    examples = by_name(task, tokenizer)
    own = examples["1.1"]
    text, ((start, end),), (first, last) = own.text, own.spans, own.own
    other = (last + 2, last + 32) if first == 0 else (0, 30)
    whole, cut = kept(text, (start, end), other), kept(text, (start, start + 9), (start + 9, end))
    assert task.score_kept(own, whole) == {"kept": 1.0, "own_document": pytest.approx(22 / 52)}
    assert task.score_kept(own, cut) == {"kept": 0.0, "own_document": 1.0}
    assert task.score_kept(own, kept(text)) == {"kept": 0.0}
    assert task.score_kept(own, kept(text, other)) == {"kept": 0.0, "own_document": 0.0}
    assert task.score_kept(own, kept(text, (0, len(text)))) == {
        "kept": 1.0,
        "own_document": pytest.approx((last - first) / len(text)),
    }
    assert task.score_kept(examples["2.1"], whole).keys() == {"own_document"}
    alone = by_name(RealQuestions(FILE), tokenizer)
    assert task.score_kept(alone["1.1"], kept(alone["1.1"].text, alone["1.1"].spans[0])) == {"kept": 1.0}
    assert task.score_kept(alone["1.3"], kept(alone["1.3"].text, (0, 50))) == {}


def test_a_word_that_a_passage_cuts_is_no_reference(tokenizer, written):
    """ "1875", cut in its middle, is not the answer "18"."""
    text = "The mill burned in 1875. It had 18 wheels."
    (example,) = RealQuestions(written(document(text, ("How many?", "18")))).examples(tokenizer, 0)
    task, year, answer = RealQuestions(written(document(text, ("How many?", "18")))), text.index("75"), example.spans[0]
    assert text[slice(*answer)] == "18"
    assert task.score_kept(example, kept(text, (0, year))) == {"kept": 0.0}
    assert task.score_kept(example, kept(text, (0, year), answer)) == {"kept": 1.0}


def test_a_reference_in_another_document_is_not_kept(tokenizer, written):
    lines = [document(f"Text {number} names an owl.", ("Which bird?", "owl")) for number in (1, 2)]
    task = RealQuestions(written(*lines), join=2)
    first, second = sorted(task.examples(tokenizer, 0), key=lambda one: one.own)
    assert task.score_kept(first, kept(first.text, second.own)) == {"kept": 0.0, "own_document": 0.0}
    assert task.score_kept(second, kept(first.text, second.own)) == {"kept": 1.0, "own_document": 1.0}


@pytest.mark.parametrize(
    ("name", "answer", "right", "f1"),
    [
        ("1.1", "It received the FORTY crates, of lemons.", 1, 8 / 10),  # it received forty crates of lemons
        ("1.1", "crates of lemons", 0, 6 / 7),
        ("1.3", "They did not know.", 0, 0),
        ("1.3", "No.", 1, 1),
        ("1.5", "", 0, 0),
        ("2.1", "(B)", 1, 0),
        ("2.1", "B. The tall one", 1, 4 / 6),  # tall one; tall one in corner
        ("2.1", "(A) The tall one in the corner", 0, 1),
        ("2.1", "the tall one in the corner", 1, 1),
        ("2.2", "The answer is (A).", 1, 0),
        ("2.2", "(B) Velm", 0, 0),
    ],
)
def test_scores(tokenizer, name, answer, right, f1):
    task = RealQuestions(FILE)
    scores = task.score(by_name(task, tokenizer)[name], answer)
    assert scores == {"right": right, "f1": pytest.approx(f1)}


def test_longest_answers(tokenizer):
    task = RealQuestions(FILE)
    longest = {one.group: task.new_tokens(one) for one in task.examples(tokenizer, 0)}
    assert longest == {"multiple choice": 32, "verbatim": 64, "other": 64}


@pytest.mark.parametrize(
    ("question", "options"),
    [
        (
            "Which?\n\n (A) The smallest one \n (B) The tall one in the corner\n (C) Both (A) and (B)\n (D) Plan B",
            OPTIONS,
        ),
        ("Which? (A) one (B) two words (C) three", {"A": "one", "B": "two words", "C": "three"}),
        ("Which?\n(A) one (B) two", {"A": "one", "B": "two"}),
        ("Is option (A) any good?", {}),
        ("Which? (B) one (C) two", {}),
        ("Why does f(A) exceed f(B)?", {}),
        ("", {}),
    ],
)
def test_options(question, options):
    assert real_questions.options(question) == options


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *((form, "B") for form in ("(B)", "B", "B)", "B.", " b ", "b)", "(b).", "**B**", "B:", "B, of course", '"B"')),
        *((f"{start} {form}", "B") for start in ("The answer is", "Answer:", "Option") for form in ("(B)", "B", "B.")),
        ("I think B because he said so.", "B"),
        ("B\n\nHe said so.", "B"),
        ("It's B", "B"),
        ("A", "A"),
        ("A is correct.", "A"),
        ("a", "A"),
        ("(B) The tall one in the corner", "B"),
        ("B. the tall  one\nin the corner", "B"),
        ("The tall one in the corner.", "B"),
        ("He left the tall one in the corner alone.", "B"),
        ("(C) Both (A) and (B)", "C"),
        ("(C) Both (A) an", "C"),  # cut short
        ("C) Both (A)", "C"),
        ("Both (A) and (B)", "C"),
        ("Plan B", "D"),
        ("D", "D"),
        ("The answer is (D) Plan B.", "D"),
        ("(A) or (B)", None),
        ("A and B", None),
        ("A, B", None),
        ("B/D", None),
        ("(B). No, (D).", None),
        ("The smallest one, or the tall one in the corner", None),
        ("A tall clock", None),
        ("A tall clock in (B)", "B"),
        ("I took vitamin D", None),
        ("(E)", None),
        ("F", None),
        ("none of them", None),
        ("", None),
    ],
)
def test_chosen(answer, letter):
    assert real_questions.chosen(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("Chelsea", "A"),
        ("chelsea clinton.", "B"),
        ("(B), because no Chelsea would", "B"),
        ("John D. Smith", "C"),
        ("(C) John D. Smith", "C"),
        ("(C) John D.", "C"),
        ("No", "D"),
        ("Nobody", None),
        ("7", "E"),
        ("17", None),
        ("(F)", "F"),
    ],
)
def test_chosen_among_names(answer, letter):
    assert real_questions.chosen(answer, PEOPLE) == letter


GOOD = document("Text.", ("Q?", "A"))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([GOOD, "{no"], "lines.jsonl, line 2: is not JSON"),
        ([GOOD, "", "[1]"], "line 3: is [1], expected a document with questions as a JSON object"),
        (
            [GOOD, {"input": "x", "instructions": ["y"]}],
            "line 2: field 'outputs' is missing, expected a list of strings",
        ),
        ([GOOD | {"input": "\n"}], "line 1: field 'input' is '\\n', expected a string that is not empty"),
        ([GOOD | {"outputs": []}], "line 1: field 'outputs' is [], expected a list of strings"),
        ([GOOD | {"outputs": "A"}], "line 1: field 'outputs' is 'A', expected a list of strings"),
        ([GOOD | {"outputs": [7]}], "line 1: item 1 of 'outputs' is 7, expected a string that is not empty"),
        ([GOOD | {"outputs": ["A", "B"]}], "line 1: 1 instructions but 2 outputs, expected one output for each"),
        ([], "lines.jsonl: is empty, expected a document with questions as a JSON object on each line"),
    ],
)
def test_faults_of_a_file(written, lines, said):
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        RealQuestions(written(*lines))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "questions_file is missing; give a JSONL file with the fields input, instructions and outputs"),
        ({"questions_file": "no.jsonl"}, "no.jsonl: cannot be read (No such file or directory)"),
        ({"questions_file": FILE, "join": 0}, "join is 0: expected a number in [1, 100000]"),
        ({"questions_file": FILE, "count": 0}, "count is 0: expected a number in [1, 100000]"),
    ],
)
def test_faults_of_settings(settings, said):
    with pytest.raises(UserError, match=re.escape(said)):
        RealQuestions(**settings)
