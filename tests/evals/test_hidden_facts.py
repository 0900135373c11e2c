"""Generated facts: where they are, that their answers are theirs alone, and that the splits share nothing."""

import itertools
import re
import string

import pytest

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals.tasks import hidden_facts
from gemfilter_jax.evals.tasks.hidden_facts import HiddenFacts

SPLITS = ("train", "held_out")
LEAST_TEMPLATES = 24
ORDINARY_WORDS = 5  # so many in a row are a wording


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
def test_examples(tokenizer, split, asked, distractors):
    tokens, templates = 900, {template.name: template for template in hidden_facts.load(split).templates}
    task = HiddenFacts(count=len(templates), split=split, facts=asked, distractors=distractors, seed=3)
    made = list(task.examples(tokenizer, tokens))
    assert {example.name for example in made} == set(templates)
    for example in made:
        template = templates[example.name]
        assert len(example.references) == len(example.spans) == asked
        assert len(re.findall(pattern(template), example.text)) == asked + distractors
        for answer, (start, end) in zip(example.references, example.spans, strict=True):
            assert re.fullmatch(pattern(template), example.text[start:end])
            (place,) = occurrences(answer, example.text)
            assert start <= place < end
            assert not occurrences(answer, example.question)
            before, after = example.text[:start], example.text[end:]
            assert re.search(r"""(^|[.!?]["'”’)]* |\n\n)$""", before), before[-30:]
            assert re.match(r"\n\n|$| [^a-z]", after), after[:30]
            if template.own_paragraph:
                assert example.text[start:end] in example.text.split("\n\n")
        assert abs(len(tokenizer(example.text)["input_ids"]) - tokens) <= 0.03 * tokens


def test_a_question_for_several_facts_names_all(tokenizer):
    templates = {template.name: template for template in hidden_facts.load("held_out").templates}
    for example in HiddenFacts(count=8, facts=3).examples(tokenizer, 600):
        (asked,) = slots(templates[example.name].question)
        named = pattern(templates[example.name], group=asked)
        first, second, third = (re.fullmatch(named, example.text[slice(*span)])[1] for span in example.spans)
        assert f"{first}, {second} and {third}" in example.question


def test_the_same_seed_gives_the_same_examples(tokenizer):
    first, again, other = (list(HiddenFacts(count=5, seed=seed).examples(tokenizer, 300)) for seed in (1, 1, 2))
    assert first == again
    assert [example.name for example in first] != [example.name for example in other]
    assert {example.text for example in first}.isdisjoint(example.text for example in other)


def test_facts_are_anywhere(tokenizer):
    kinds, depths = set(), []
    for example in HiddenFacts(count=93, distractors=0).examples(tokenizer, 1_000):
        (start, end) = example.spans[0]
        kinds.add((example.text[:start][-2:] in ("", "\n\n"), example.text[end:][:2] in ("", "\n\n")))
        depths.append(example.depth)
    assert kinds == set(itertools.product([True, False], repeat=2))
    assert 0.4 < sum(depths) / len(depths) < 0.6
    assert min(depths) < 0.1
    assert max(depths) > 0.8


@pytest.mark.parametrize("split", SPLITS)
def test_one_document_with_many_facts(tokenizer, split):
    task = HiddenFacts(count=LEAST_TEMPLATES, per_text=LEAST_TEMPLATES, split=split, distractors=1)
    made = list(task.examples(tokenizer, 6_000))
    assert len({example.text for example in made}) == 1
    assert len({example.name for example in made}) == len({example.spans for example in made}) == LEAST_TEMPLATES
    for example in made:
        (place,) = occurrences(example.references[0], example.text)
        assert example.spans[0][0] <= place < example.spans[0][1]
    assert abs(len(tokenizer(made[0].text)["input_ids"]) - 6_000) <= 180


def test_other_texts(tokenizer):
    paragraphs = tuple(f"Paragraph {index} is here. It says nothing." for index in "abcdefgh")
    for example in HiddenFacts(count=4, paragraphs=paragraphs).examples(tokenizer, 400):
        assert "Paragraph" in example.text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"tokens": 20, "count": 3}, "ask for a longer one"),
        ({"tokens": 4_000, "count": 3, "distractors": 60}, "fewer facts and distractors"),
        ({"tokens": 400, "split": "test"}, "one of train, held_out"),
        ({"tokens": 4_000, "count": 99, "per_text": 99}, "99 facts of different templates"),
        ({"tokens": 400, "facts": 5}, r"facts is 5: expected a number in \[1, 4\]"),
        ({"tokens": 400, "facts": 2, "per_text": 4}, "per_text is 4; such questions ask for one fact"),
        ({"tokens": 400, "texts": "/no/such/folder"}, "/no/such/folder: is not a folder"),
    ],
)
def test_mistakes(tokenizer, arguments, said):
    tokens = arguments["tokens"]
    options = {name: value for name, value in arguments.items() if name != "tokens"}
    with pytest.raises(UserError, match=said):
        list(HiddenFacts(**options).examples(tokenizer, tokens))
