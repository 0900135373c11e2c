"""Facts without a literal match: no content word is shared with a question, and no other fact answers it."""

import collections
import functools
import itertools
import math
import re
import string

import pytest

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals import haystack
from gemfilter_jax.evals.tasks import no_literal_match
from gemfilter_jax.evals.tasks.no_literal_match import NoLiteralMatch

FACTS, NAMES = no_literal_match.load()
LEAST_FACTS = 45
TOKENS = 500
STOP_WORDS = """
    a about after again all an and any are as at be been before but by can could did do does every for from had has have
    his her if in into is it its just may might more most must my no nor not of off on once one only or other out over
    own should so some somebody something than that the their them then there they this those to up was were what when
    where which while who whom whose why will with would people person
"""

every_fact = pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.name)


@pytest.fixture(scope="module")
def every_example(tokenizer):
    return list(NoLiteralMatch().examples(tokenizer, TOKENS))


@functools.cache
def content_words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower())) - set(STOP_WORDS.split())


def alike(one: str, other: str) -> bool:
    """Whether words of four letters or more agree in their first five, or in the shorter word; others are equal."""
    length = min(len(one), len(other), 5)
    return one[:length] == other[:length] if length >= 4 else one == other


def shared_words(question: str, text: str) -> set[str]:
    """The content words of a question that are in a text, be it in another form."""
    words = content_words(text)
    return {asked for asked in content_words(question) if any(alike(asked, word) for word in words)}


def overlap(question: str, documents: list[str]) -> list[float]:
    """For each document the sum of the BM25 weights of the question's words that it holds."""
    held = [shared_words(question, document) for document in documents]
    counts = collections.Counter(itertools.chain.from_iterable(held))
    return [sum(math.log(1 + (len(held) - counts[word] + 0.5) / (counts[word] + 0.5)) for word in one) for one in held]


@pytest.mark.parametrize(
    ("question", "text", "shared"),
    [
        ("Who has been to Germany?", "The German flag was hers.", {"germany"}),
        ("Who can read Japanese?", "He was ready to eat.", {"read"}),
        ("Who has seen the sea?", "They saw a seal.", set()),
        ("Who likes ice?", "Ice was like glass.", {"likes", "ice"}),
        ("Who is out of the house?", "Who is out of it?", set()),
    ],
)
def test_words_in_other_forms_are_shared(question, text, shared):
    assert shared_words(question, text) == shared


@every_fact
def test_a_question_shares_no_word_with_any_fact(fact):
    for question in (fact.one, fact.two):
        assert content_words(question)
        shared = {other.name: words for other in FACTS if (words := shared_words(question, other.text))}
        assert shared == {}
        assert overlap(question, [other.of("Akira") for other in FACTS]) == [0.0] * len(FACTS)


def test_the_overlap_finds_a_shared_word():
    fact = no_literal_match.Fact("", "", "{name} ate bread at the Taj Mahal.", "Who avoids bread?", "", "")
    assert overlap(fact.one, [fact.text, *(other.text for other in FACTS)])[0] > 0


def test_no_sentence_of_the_essays_answers():
    """They name nobody, and have at most one word of a question in a sentence."""
    text = "\n\n".join(haystack.built_in("essays"))
    sentences = [sentence for sentence in re.split(r"(?<=[.!?])\s+", text) if sentence]
    for fact in FACTS:
        for question in (fact.one, fact.two):
            found = {sentence: words for sentence in sentences if len(words := shared_words(question, sentence)) > 1}
            assert found == {}


def test_facts_are_whole():
    assert len(FACTS) >= LEAST_FACTS
    assert len({fact.name for fact in FACTS}) == len({fact.text for fact in FACTS}) == len(FACTS)
    assert len({question for fact in FACTS for question in (fact.one, fact.two)}) == 2 * len(FACTS)
    for fact in FACTS:
        assert [slot for _, slot, _, _ in string.Formatter().parse(fact.text) if slot is not None] == ["name"]
        assert fact.text.endswith((".", '."'))
        for question in (fact.one, fact.two):
            assert re.search(r"\b(who|whose|which person)\b", question.lower())
            assert question.endswith("?")
        assert fact.why.endswith(".")


def test_names_are_nowhere_else():
    assert len(set(NAMES)) == len(NAMES) >= 60
    texts = [*haystack.built_in("essays"), *haystack.built_in("journal")]
    texts += [text for fact in FACTS for text in (fact.text, fact.one, fact.two)]
    for name in NAMES:
        assert name.isalpha()
        assert not [text for text in texts if name.lower() in text.lower()]
        assert [other for other in NAMES if name.lower() in other.lower()] == [name]


def test_every_fact_is_asked_for_by_both_questions(every_example):
    assert len(every_example) == 2 * len(FACTS) >= 90
    wanted = {(f"{fact.name}, {hop}", fact.question(hop)) for fact in FACTS for hop in ("one", "two")}
    assert {(example.name, example.question) for example in every_example} == wanted
    assert [example.group for example in every_example[:4]] in (
        ["one hop", "two hops", "one hop", "two hops"],
        ["two hops", "one hop", "two hops", "one hop"],
    )
    assert len({example.text for example in every_example}) == len(every_example)


def test_the_asked_fact_and_the_distractors(every_example):
    """Only the asked fact names its person; the others are of other kinds, and share no word with the question."""
    by_name = {fact.name: fact for fact in FACTS}
    for example in every_example:
        fact, ((start, end),), (name,) = by_name[example.name.split(",")[0]], example.spans, example.references
        assert example.text[start:end] == fact.of(name)
        (place,) = (found.start() for found in re.finditer(name, example.text, re.IGNORECASE))
        assert start <= place < end
        assert name not in example.question
        named = [other for other in NAMES if other in example.text]
        others = [fact for fact in FACTS for other in named if other != name and fact.of(other) in example.text]
        assert len(others) == len(named) - 1 == 2
        assert len({one.kind for one in (fact, *others)}) == 3
        assert [shared_words(example.question, one.text) for one in others] == [set(), set()]
        before, after = example.text[:start], example.text[end:]
        assert re.search(r"""(^|[.!?]["'”’)]* |\n\n)$""", before), before[-30:]
        assert re.match(r"\n\n|$| [^a-z]", after), after[:30]


def test_lengths(tokenizer, every_example):
    for example in every_example:
        assert example.tokens == TOKENS
        assert abs(len(tokenizer(example.text)["input_ids"]) - TOKENS) <= 0.03 * TOKENS


def test_depths_are_spread_evenly(tokenizer):
    made = NoLiteralMatch(count=40, distractors=0).examples(tokenizer, 2_000)
    depths = sorted(example.spans[0][0] / len(example.text) for example in made)
    assert all(abs(depth - (i + 0.5) / 40) < 0.15 for i, depth in enumerate(depths))


def test_the_same_seed_gives_the_same_examples(tokenizer, every_example):
    assert list(NoLiteralMatch().examples(tokenizer, TOKENS)) == every_example
    assert list(NoLiteralMatch(count=5).examples(tokenizer, TOKENS)) == every_example[:5]
    other = list(NoLiteralMatch(seed=1).examples(tokenizer, TOKENS))
    assert [example.name for example in other] != [example.name for example in every_example]
    assert {example.text for example in other}.isdisjoint(example.text for example in every_example)


@pytest.mark.parametrize(("hops", "group"), [("one", "one hop"), ("two", "two hops")])
def test_one_kind_of_question(tokenizer, hops, group):
    made = list(NoLiteralMatch(hops=hops, distractors=0).examples(tokenizer, 200))
    assert len({example.name for example in made}) == len(made) == len(FACTS)
    assert {example.group for example in made} == {group}
    more = list(NoLiteralMatch(hops=hops, count=len(FACTS) + 1, distractors=0).examples(tokenizer, 200))
    assert more[-1].question == more[0].question
    assert more[-1].text != more[0].text


@pytest.mark.parametrize(
    ("answer", "right"), [("{name}", 1), ("It was {name}, I think.", 1), ("The text names nobody.", 0), ("", 0)]
)
def test_scores(every_example, answer, right):
    example = every_example[0]
    assert NoLiteralMatch().score(example, answer.format(name=example.references[0])) == {"right": right}


def test_other_texts(tokenizer, tmp_path):
    """Names that they contain are not drawn."""
    absent = set(NAMES[::8])
    said = " ".join(f"There {name} was." for name in NAMES if name not in absent)
    (tmp_path / "a.txt").write_text(f"{said} " * 6, encoding="utf-8")
    made = list(NoLiteralMatch(texts=str(tmp_path)).examples(tokenizer, 300))
    assert {example.references[0] for example in made} <= absent
    assert all(f"There {NAMES[1]} was." in example.text for example in made)
    with pytest.raises(UserError, match=f"{len(absent)} of the names are not in the texts already; ask for fewer or"):
        NoLiteralMatch(texts=str(tmp_path), distractors=len(absent))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "3 facts take .* tokens, the text is to have 20; ask for a longer one"),
        ({"distractors": 40}, "distractors is 40: the facts are of 13 kinds; ask for fewer"),
        ({"distractors": -1}, r"distractors is -1: expected a number in \[0, 100000\]"),
        ({"hops": "three"}, "hops is three: one of one, two, both"),
        ({"count": 0}, r"count is 0: expected a number in \[1, 100000\]"),
        ({"texts": "/no/such/folder"}, "/no/such/folder: is not a folder"),
    ],
)
def test_mistakes(tokenizer, options, said):
    with pytest.raises(UserError, match=said) as caught:
        list(NoLiteralMatch(**options).examples(tokenizer, 20))
    assert "\n" not in str(caught.value)
