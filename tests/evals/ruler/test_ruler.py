"""RULER's subtasks: the published prompts, what the texts contain and where, their lengths, and mistakes."""

import collections
import itertools
import random
import re

import numpy as np
import pytest
from ruler_samples import prose, spanned

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals.example import Example
from gemfilter_jax.evals.ruler import drafts
from gemfilter_jax.evals.tasks import ruler
from gemfilter_jax.evals.tasks.ruler import Ruler
from gemfilter_jax.text import prompt

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
WORD = r"[a-z]+-[a-z]+"
NUMBER = r"\d{7}"
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
# (patterns of key and value, name of values, keys, values of each key, keys asked for)
NEEDLES = {
    "niah_single_1": (WORD, NUMBER, "numbers", 1, 1, 1),
    "niah_single_2": (WORD, NUMBER, "numbers", 1, 1, 1),
    "niah_single_3": (WORD, UUID, "uuids", 1, 1, 1),
    "niah_multikey_1": (WORD, NUMBER, "numbers", 4, 1, 1),
    "niah_multikey_2": (WORD, NUMBER, "numbers", None, 1, 1),
    "niah_multikey_3": (UUID, UUID, "uuids", None, 1, 1),
    "niah_multivalue": (WORD, NUMBER, "numbers", 1, 4, 1),
    "niah_multiquery": (WORD, NUMBER, "numbers", 4, 1, 4),
}
ESSAYS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
WITHOUT_FILES = (*NEEDLES, "vt", "cwe", "fwe")
SUBTASKS = (*WITHOUT_FILES, "qa_1", "qa_2")

one_needle = pytest.mark.parametrize("subtask", NEEDLES)


def message(example: Example, text: str) -> str:
    return example.message_format.replace("{text}", text).replace("{question}", example.question)


VT_BEFORE = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
VT_AFTER = (
    "\nQuestion: Find all variables that are assigned the value {0} in the text above. Answer: According to the "
    "chain(s) of variable assignment in the text above, 5 variables are assigned the value {0}, they are: "
)
CWE_BEFORE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n"
)
CWE_AFTER = (
    "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often "
    "in the list are:"
)
FWE_BEFORE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. "
)
FWE_AFTER = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
    "appeared words are:"
)
QA_ORDER = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)


def published(example: Example) -> tuple[str, str]:
    """RULER's prompt of an example, after the example with an answer: the parts before and after the text."""
    if example.group in NEEDLES:
        values = NEEDLES[example.group][2]
        keys = [
            re.fullmatch(rf"One of the special magic {values} for (.+) is: .+\.", one)[1] for one in spanned(example)
        ]
        if len(example.references) == 1:
            return (
                f"A special magic {values[:-1]} is hidden within the following text. Make sure to memorize it. I will "
                f"quiz you about the {values[:-1]} afterwards.\n",
                f"\nWhat is the special magic {values[:-1]} for {keys[0]} mentioned in the provided text? The special "
                f"magic {values[:-1]} for {keys[0]} mentioned in the provided text is",
            )
        named = keys[0] if len(set(keys)) == 1 else "{}, {}, {}, and {}".format(*keys)
        return (
            f"Some special magic {values} are hidden within the following text. Make sure to memorize it. I will quiz "
            f"you about the {values} afterwards.\n",
            f"\nWhat are all the special magic {values} for {named} mentioned in the provided text? The special magic "
            f"{values} for {named} mentioned in the provided text are",
        )
    if example.group == "vt":
        return VT_BEFORE, VT_AFTER.format(spanned(example)[0][-5:])
    if example.group == "cwe":
        return CWE_BEFORE, CWE_AFTER
    if example.group == "fwe":
        return FWE_BEFORE, FWE_AFTER
    asked = re.search(r"Question: (.*\?) Answer:$", message(example, ""))[1]
    return f"{QA_ORDER}\n\nThe following are given documents.\n\n", f"\n\n{QA_ORDER}\n\nQuestion: {asked} Answer:"


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_prompts_are_the_published_ones(subtask, make, tokenizer):
    for example in make(subtask, 900):
        before, after = published(example)
        whole = message(example, example.text)
        assert whole.endswith(f"{before}{example.text}{after}")
        shown = whole.removesuffix(f"{before}{example.text}{after}")
        assert bool(shown) == (subtask in ("vt", "cwe"))
        assert before.strip() not in example.text
        encoded = prompt.encode(
            tokenizer,
            example.text,
            example.question,
            observation_rows=4,
            chat_template=False,
            message_format=example.message_format,
        )
        assert tokenizer.decode(encoded.ids) == whole


def test_answers_are_as_long_as_published(make):
    lengths = {
        **dict.fromkeys(NEEDLES, 128),
        "vt": 30,
        "cwe": 120,
        "fwe": 50,
        "qa_1": 32,
        "qa_2": 32,
    }
    assert {name: Ruler().new_tokens(make(name, 900)[0]) for name in SUBTASKS} == lengths


def test_default_subtasks_need_no_file(tokenizer):
    made = list(Ruler(count=2).examples(tokenizer, 700))
    assert [example.group for example in made] == [name for name in WITHOUT_FILES for _ in range(2)]
    assert len({example.name for example in made}) == len(made)
    assert len({example.text for example in made}) == len(made)


@pytest.mark.parametrize("tokens", [400, 1_300, 4_500])
@pytest.mark.parametrize("kind", ["default", "bytes", "words"])
def test_lengths(make, tokenizers, kind, tokens):
    least = {
        "default": {"qa_2": 600},
        "words": {},
        "bytes": {"vt": 700, "cwe": 5_500, "qa_1": 600, "qa_2": 1_500, "niah_multikey_3": 700, "fwe": 500},
    }
    for subtask in SUBTASKS:
        if tokens < least[kind].get(subtask, 0):
            continue
        for example in make(subtask, tokens, tokenizer=kind):
            assert example.tokens == tokens
            found = len(tokenizers[kind](example.text, add_special_tokens=False)["input_ids"])
            assert abs(found - tokens) <= 0.02 * tokens, (subtask, found)


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_too_short_lengths_are_refused(subtask, make):
    shortest = {"niah_single_1": 30, "niah_single_2": 30, "niah_multikey_2": 30, "niah_single_3": 40, "qa_2": 250}
    tokens = shortest.get(subtask, 70)
    with pytest.raises(UserError, match=rf"^{subtask}: the shortest text takes \d+ tokens, expected {tokens}; ask for"):
        make(subtask, tokens)


@pytest.mark.parametrize("subtask", ["niah_single_1", "niah_multikey_3", "niah_multiquery", "cwe", "fwe"])
def test_little_is_tokenized_besides_the_text(subtask, tokenizer):
    """So the time for an example grows in proportion to its length."""
    lengths = []

    def counting(text, **options):
        lengths.append(len(text))
        return tokenizer(text, **options)

    (example,) = Ruler(subtasks=subtask, count=1).examples(counting, 128_000)
    assert lengths.count(len(example.text)) >= 1
    assert sum(lengths) <= 4 * len(example.text)


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_examples_are_a_function_of_the_task(subtask, make, files, tokenizer):
    made = make(subtask, 900)
    options = {f"{subtask}_file": files[subtask]} if subtask in files else {}
    assert made == list(Ruler(subtasks=subtask, count=3, **options).examples(tokenizer, 900))
    assert made[:1] == make(subtask, 900, count=1)
    other = make(subtask, 900, seed=1)
    assert {one.text for one in made}.isdisjoint(one.text for one in other)
    assert {one.question for one in made} != {one.question for one in other} or subtask in ("cwe", "fwe")
    assert [one.references for one in made] != [one.references for one in other]
    longer = make(subtask, 1_300)
    assert [one.references for one in longer] == [one.references for one in made] or subtask == "fwe"


@one_needle
@pytest.mark.parametrize("tokens", [500, 4_500])
def test_needles_are_hidden_once(subtask, tokens, make):
    key, value, values, keys, of_each, asked = NEEDLES[subtask]
    needle = re.compile(rf"One of the special magic {values} for ({key}) is: ({value})\.")
    for example in make(subtask, tokens, count=6):
        assert len(example.references) == len(set(example.references)) == asked * of_each
        found = [match.groups() for match in needle.finditer(example.text)]
        hidden_keys, hidden_values = zip(*found, strict=True)
        assert len(set(hidden_values)) == len(hidden_values)
        assert set(collections.Counter(hidden_keys).values()) == {of_each}
        if keys is not None:
            assert len(set(hidden_keys)) == keys
        else:
            assert len(found) > tokens / 100
        asked_keys = []
        for reference, passage in zip(example.references, spanned(example), strict=True):
            match = needle.fullmatch(passage)
            assert match[2] == reference
            assert example.text.lower().count(reference) == 1
            assert example.text.count(match[1]) == of_each
            assert match[1] in example.question
            asked_keys.append(match[1])
        assert len(set(asked_keys)) == asked
        assert [one for one in set(hidden_keys) if one in example.question] == [*set(asked_keys)] or asked > 1
        rest = needle.sub("", example.text)
        if subtask in ESSAYS:
            assert "special magic" not in rest
            assert "\n" not in example.text
        elif keys is None:
            (cut,) = [line for line in rest.split("\n") if line] or [""]
            assert "One of the special magic".startswith(cut[:24])
            assert example.text.endswith(cut)
        else:
            *lines, last = [line for line in rest.split("\n") if line]
            assert set(lines) == {NOISE}
            assert NOISE.startswith(last)
            assert not example.text.endswith(passage)


@pytest.mark.parametrize("subtask", ["niah_single_2", "niah_multivalue"])
def test_needles_are_at_depths_between_sentences(subtask, make):
    first = []
    for example in make(subtask, 1_300, count=24):
        first.append(example.depth)
        for start, end in example.spans:
            before, after = example.text[:start], example.text[end:]
            assert not before or re.search(r"""[.!?]["'”’)]* $""", before) or not re.search(r"[.!?]\s", after)
            assert not after or after[0] == " "
            assert not after.startswith("  ")
    assert min(first) < 0.1
    assert max(first) > (0.85 if subtask == "niah_single_2" else 0.25)
    assert 0.3 < np.mean(first) < 0.7 or subtask == "niah_multivalue"


def test_depths_are_forty_evenly_spaced_ones():
    allowed = {int(200 * (depth / 100)) for depth in np.round(np.linspace(0, 100, num=40))}
    drawn = [drafts.depths(random.Random(seed), 4, 200) for seed in range(80)]
    assert all(places == sorted(set(places)) and len(places) == 4 for places in drawn)
    assert set(itertools.chain.from_iterable(drawn)) == allowed


def test_hidden_needles_are_before_their_sentences():
    draft = drafts.hidden(["a.", "b.", "c."], ["X.", "Y.", "Z. "], [0, 2, 3], " ")
    assert draft.text == "X. a. b. Y. c. Z. "
    assert [draft.text[start:end] for start, end in draft.spans] == ["X.", "Y.", "Z."]


def chain(lines: list[str], letters: int) -> tuple[str, list[str]]:
    """The value and the variables of the statements among lines of noise."""
    statements = [line for line in lines if line.startswith("VAR ")]
    value = re.fullmatch(rf"VAR [A-Z]{{{letters}}} = (\d{{5}})", statements[0])[1]
    names = [line.split()[1] for line in statements]
    for before, after in itertools.pairwise(names):
        assert f"VAR {after} = VAR {before} " in statements
    assert len(statements) == len(set(names)) == 5
    assert all(len(name) == letters for name in names)
    return value, names


def test_variables(make):
    for example in make("vt", 1_300, count=6):
        lines = example.text.split("\n")
        value, names = chain(lines, 5)
        assert names == list(example.references)
        assert all(one.startswith(f"VAR {name} = ") for one, name in zip(spanned(example), names, strict=True))
        assert spanned(example) == [line.rstrip() for line in lines if line.startswith("VAR ")]
        *noise, last = [line for line in lines if not line.startswith("VAR ")]
        assert set(noise) == {NOISE}
        assert NOISE.startswith(last)
        assert lines[-1] == last
        assert example.text.count(value) == 1
        assert [example.text.count(name) for name in names] == [2, 2, 2, 2, 1]
        assert not any(name.lower() in NOISE.lower() for name in names)

        shown = example.message_format.removesuffix(f"\n\n{VT_BEFORE}{{text}}\nQuestion: {{question}}")
        before, _, answer = shown.rpartition(":  ")
        value_shown, names_shown = chain(before.split("\n"), 3)
        assert answer.split() == names_shown
        assert before.startswith(VT_BEFORE)
        assert f"{before}: ".endswith(VT_AFTER.format(value_shown))
        assert before.count(NOISE) == 14
        assert value_shown != value
        assert not any(name in "".join(names) for name in names_shown)


def counted(text: str) -> collections.Counter[str]:
    """The words of a numbered list."""
    items = re.findall(r"(\d+)\. ([a-z-]+)", text)
    assert [int(number) for number, _ in items] == list(range(1, len(items) + 1))
    assert text == " ".join(f"{number}. {word}" for number, word in items)
    return collections.Counter(word for _, word in items)


@pytest.mark.parametrize(
    ("tokens", "kind", "times", "times_other", "shown_times", "shown_other", "pairs"),
    [
        (900, "default", 6, 1, 3, 1, False),
        (4_095, "default", 6, 1, 3, 1, False),
        (4_096, "default", 30, 3, 10, 3, False),
        (40_000, "words", 30, 3, 10, 3, True),
    ],
)
def test_common_words(make, tokens, kind, times, times_other, shown_times, shown_other, pairs):
    for example in make("cwe", tokens, tokenizer=kind):
        words = counted(example.text)
        common = {word for word, count in words.items() if count == times}
        assert common == set(example.references)
        assert len(example.references) == 10
        assert {count for word, count in words.items() if word not in common} == {times_other}
        assert not any(one in other for one, other in itertools.permutations(common, 2))
        assert {"-" in word for word in words} == {pairs}
        assert example.spans == ()
        shown, empty = example.message_format.split(f"\n{CWE_BEFORE}{{text}}\nQuestion: {{question}}")
        assert empty == ""
        text, answer = shown.removeprefix(CWE_BEFORE).split(CWE_AFTER)
        words_shown = counted(text)
        common_shown = {word for word, count in words_shown.items() if count == shown_times}
        assert set(counted(answer.strip())) == common_shown
        assert len(common_shown) == 10
        assert len(words_shown) == (20 if tokens < 4_096 else 40)
        assert {count for word, count in words_shown.items() if word not in common_shown} == {shown_other}
        assert set(words).isdisjoint(words_shown)


@pytest.mark.parametrize("tokens", [400, 1_300, 4_500])
def test_frequent_words(make, tokens):
    zeta = np.sum(np.arange(1.0, 1e6) ** -2)
    for example in make("fwe", tokens, count=6):
        words = collections.Counter(example.text.split(" "))
        (noise, most), *ranked = words.most_common()
        assert noise == "..."
        assert {word for word, _ in ranked[:3]} == set(example.references)
        assert ranked[2][1] > ranked[3][1]
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked)
        assert len(words) <= max(tokens // 50, 5)
        size = most * zeta
        for rank, (_, count) in enumerate(ranked, 2):
            assert abs(count - size / (rank**2 * zeta)) <= 1.3
        assert example.spans == ()
    orders = {tuple(example.text.split(" ")[:20]) for example in make("fwe", tokens, count=6)}
    assert len(orders) == 6


def test_score_is_the_share_of_references(make):
    task = Ruler()
    (example, *_) = make("niah_multivalue", 900)
    one, two, three, four = example.references
    for answer, share in [(f"{one}, {two} and {four}.", 0.75), (f"{one}{two}{three}{four}", 1.0), ("none", 0.0)]:
        assert task.score(example, answer) == {"right": share}
    (example, *_) = make("vt", 900)
    scores = task.score(example, " ".join(example.references[:2]).lower())
    assert scores == {"right": pytest.approx(0.4)}
    assert isinstance(scores["right"], float)


def test_essays_are_taken_from_a_folder(tokenizer, tmp_path):
    rng = random.Random(5)
    own = [prose(rng, 12) for _ in range(80)]
    (tmp_path / "own.txt").write_text(
        "\n\n".join(f"{one}\n{two}" for one, two in zip(own[::2], own[1::2], strict=True))
    )
    for example in Ruler(subtasks="niah_multiquery,vt", count=2, texts=str(tmp_path)).examples(tokenizer, 900):
        sentences = sum(one in example.text for one in own)
        assert sentences >= 8 if example.group == "niah_multiquery" else sentences == 0


def test_draws_are_new_and_absent_from_the_text():
    draws = drafts.Draws(random.Random(0), "a text with red-car and nothing else")
    offered = iter(["red-car", "old-car", "cold-carpet", "old-car", "new-car", "new-car", "cold-carpet"])
    assert draws.unlike(lambda: next(offered), reserve=True) == "old-car"
    assert draws.unlike(lambda: next(offered)) == "new-car"
    with pytest.raises(UserError, match="no random word or number is left"):
        draws.unlike(lambda: "new-car")


def test_supplies_end_after_words():
    supply = drafts.Supply(iter(["One two three.", "Four five.", "f" * 30, "end"]), " ")
    assert supply.first(0) == []
    assert supply.first(6) == ["One"]
    assert supply.first(7) == ["One two"]
    assert supply.first(14) == supply.first(15) == ["One two three."]
    assert supply.first(20) == ["One two three.", "Four"]
    assert supply.first(46) == ["One two three.", "Four five.", "f" * 20]


def test_word_lists():
    lists = drafts.words()
    assert list(lists) == ["adjectives", "nouns", "verbs"]
    for own in lists.values():
        assert list(own) == sorted(set(own))
        assert all(re.fullmatch("[a-z]{3,}", word) for word in own)
    assert len(lists["adjectives"]) * len(lists["nouns"]) > 2_000_000
    assert len(drafts.all_words()) > 4_500


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"subtasks": "niah"}, "subtasks is 'niah': 'niah' is unknown; one of niah_single_1, niah_single_2, "),
        ({"subtasks": "vt,"}, "subtasks is 'vt,': '' is unknown; one of niah_single_1"),
        (
            {"subtasks": "qa_1"},
            "qa_1_file is missing, but subtasks has qa_1; give the file dev-v2.0.json of SQuAD v2.0",
        ),
        (
            {"subtasks": "vt,qa_2"},
            "qa_2_file is missing, but subtasks has qa_2; give the file hotpot_dev_distractor_v1",
        ),
        ({"qa_1_file": "x.json"}, "qa_1_file is x.json, but subtasks lacks qa_1; add it, or leave out the file"),
        ({"subtasks": "vt", "texts": "x"}, "texts is x, but no subtask of vt takes essays; leave it out"),
        ({"texts": "absent"}, "absent: is not a folder; give one with .txt or .md files"),
        ({"count": 0}, "count is 0: expected a number in [1, 100000]"),
    ],
)
def test_options_are_checked(options, said):
    with pytest.raises(UserError, match=re.escape(said)):
        Ruler(**options)


def test_more_questions_than_a_file_has_are_refused(files):
    with pytest.raises(UserError, match=r"count is 9, but .*hotpot has 8 questions; ask for at most as many"):
        Ruler(subtasks="qa_2", qa_2_file=files["qa_2"], count=9)


def test_subtasks_may_repeat_and_have_spaces(tokenizer):
    made = list(Ruler(subtasks=" vt, fwe,vt", count=1).examples(tokenizer, 700))
    assert [example.group for example in made] == ["vt", "fwe"]
    assert ruler.WITHOUT_FILES == WITHOUT_FILES
