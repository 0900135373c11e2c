"""Generated facts: where they are, that their answers are theirs alone, and that the splits share nothing."""

import itertools
import re
import string

import pytest

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals.tasks import hidden_facts

SPLITS = ("train", "held_out")
LEAST_TEMPLATES = 24
ORDINARY_WORDS = 5  # so many in a row are a wording


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return smollm2.checkpoint.tokenizer


def slots(text: str) -> set[str]:
    return {slot for _, slot, _, _ in string.Formatter().parse(text) if slot}


def pattern(template: hidden_facts.Template, group: str = "") -> str:
    """Matches the facts of a template; one slot may be its group."""
    return re.sub(r"\\{(\w+)\\}", lambda slot: "(.+?)" if slot[1] == group else ".+?", re.escape(template.text))


def occurrences(answer: str, text: str) -> list[int]:
    return [match.start() for match in re.finditer(re.escape(answer.lower()), text.lower())]


def wordings(split: str) -> set[tuple[str, ...]]:
    """All runs of a few words in the split's facts and questions, a slot being a word of the split's own."""
    texts = [text for template in hidden_facts.load(split).templates for text in (template.text, template.question)]
    words = [re.sub(r"\{\w+\}", split, text).lower().split() for text in texts]
    return {tuple(line[i : i + ORDINARY_WORDS]) for line in words for i in range(len(line) - ORDINARY_WORDS + 1)}


@pytest.mark.parametrize("split", SPLITS)
def test_templates_are_whole(split):
    material = hidden_facts.load(split)
    assert len({template.name for template in material.templates}) == len(material.templates) >= LEAST_TEMPLATES
    for template in material.templates:
        assert template.answer in template.slots
        assert set(template.slots) <= set(material.vocabularies)
        (asked,) = slots(template.question)
        assert slots(template.several) == {asked}
        assert asked in set(template.slots) - {template.answer}
    values = [value.lower() for values in material.vocabularies.values() for value in values]
    hay = "\n\n".join(material.paragraphs).lower()
    assert [value for value in values if value in hay] == []


def test_the_splits_share_nothing():
    train, held_out = map(hidden_facts.load, SPLITS)
    values = [
        {value.lower() for values in split.vocabularies.values() for value in values} for split in (train, held_out)
    ]
    assert values[0].isdisjoint(values[1])
    assert set(train.paragraphs).isdisjoint(held_out.paragraphs)
    assert wordings("train").isdisjoint(wordings("held_out"))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("asked", "distractors"), [(1, 0), (1, 2), (4, 2)])
def test_cases(tokenizer, split, asked, distractors):
    tokens, templates = 900, {template.name: template for template in hidden_facts.load(split).templates}
    made = list(
        hidden_facts.cases(tokenizer, tokens, len(templates), split=split, facts=asked, distractors=distractors, seed=3)
    )
    assert {case.name for case in made} == set(templates)
    for case in made:
        template = templates[case.name]
        assert len(case.answers) == len(case.spans) == asked
        assert len(re.findall(pattern(template), case.text)) == asked + distractors
        for answer, (start, end) in zip(case.answers, case.spans, strict=True):
            assert re.fullmatch(pattern(template), case.text[start:end])
            (place,) = occurrences(answer, case.text)
            assert start <= place < end
            assert not occurrences(answer, case.question)
            before, after = case.text[:start], case.text[end:]
            assert re.search(r"""(^|[.!?]["'”’)]* |\n\n)$""", before), before[-30:]
            assert re.match(r"\n\n|$| [^a-z]", after), after[:30]
            if template.own_paragraph:
                assert case.text[start:end] in case.text.split("\n\n")
        assert abs(len(tokenizer(case.text)["input_ids"]) - tokens) <= 0.03 * tokens


def test_a_question_for_several_facts_names_all(tokenizer):
    templates = {template.name: template for template in hidden_facts.load("held_out").templates}
    for case in hidden_facts.cases(tokenizer, 600, 8, facts=3):
        (asked,) = slots(templates[case.name].question)
        named = pattern(templates[case.name], group=asked)
        first, second, third = (re.fullmatch(named, case.text[slice(*span)])[1] for span in case.spans)
        assert f"{first}, {second} and {third}" in case.question


def test_the_same_seed_gives_the_same_cases(tokenizer):
    first, again, other = (list(hidden_facts.cases(tokenizer, 300, 5, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert [case.name for case in first] != [case.name for case in other]
    assert {case.text for case in first}.isdisjoint(case.text for case in other)


def test_facts_are_anywhere(tokenizer):
    kinds, depths = set(), []
    for case in hidden_facts.cases(tokenizer, 1_000, 93, distractors=0):
        (start, end) = case.spans[0]
        kinds.add((case.text[:start][-2:] in ("", "\n\n"), case.text[end:][:2] in ("", "\n\n")))
        depths.append(case.depth)
    assert kinds == set(itertools.product([True, False], repeat=2))
    assert 0.4 < sum(depths) / len(depths) < 0.6
    assert min(depths) < 0.1
    assert max(depths) > 0.8


@pytest.mark.parametrize("split", SPLITS)
def test_one_document_with_many_facts(tokenizer, split):
    made = hidden_facts.document(tokenizer, 6_000, LEAST_TEMPLATES, split=split, distractors=1)
    assert len({case.text for case in made}) == 1
    assert len({case.name for case in made}) == len({case.spans for case in made}) == LEAST_TEMPLATES
    for case in made:
        (place,) = occurrences(case.answers[0], case.text)
        assert case.spans[0][0] <= place < case.spans[0][1]
    assert abs(len(tokenizer(made[0].text)["input_ids"]) - 6_000) <= 180


def test_other_texts(tokenizer):
    paragraphs = [f"Paragraph {index} is here. It says nothing." for index in "abcdefgh"]
    for case in hidden_facts.cases(tokenizer, 400, 4, paragraphs=paragraphs):
        assert "Paragraph" in case.text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"tokens": 20}, "ask for a longer one"),
        ({"tokens": 4_000, "distractors": 60}, "fewer facts and distractors"),
        ({"tokens": 400, "split": "test"}, "one of train, held_out"),
    ],
)
def test_mistakes(tokenizer, arguments, said):
    with pytest.raises(UserError, match=said):
        list(hidden_facts.cases(tokenizer, count=3, **arguments))


def test_a_document_of_more_facts_than_templates(tokenizer):
    with pytest.raises(UserError, match="99 facts of different templates"):
        hidden_facts.document(tokenizer, 4_000, 99)
