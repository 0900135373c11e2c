"""Passages of many kinds of text: what belongs together and what does not, in time linear in the length."""

import itertools
import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemfilter_jax.text import chunking

_PARTS = {
    "sentences": ["It rained all day.", " Was it cold outside?", " Nobody knew that for sure!"],
    "quotes": ['"It rained all day."', " She said so herself.", " (Nobody else did say it.)", " Then it was over."],
    "abbreviations": [
        "Dr. J. R. Smith came on Jan. 5 to the U.S. office, e.g. by train, cf. Fig. 3 there.",
        " He left at once.",
    ],
    "numbers of items": [
        "There are two reasons: 1. We have no time, and 2. We have no money at all.",
        " That is it then.",
    ],
    "wrapped prose": [
        "It was the best of times, it was the worst of times, it was the age of\n"
        "wisdom, it was the age of foolishness, it was the epoch of belief.",
        " It was\nthe season of Light.\n\n",
        "Another paragraph is here.",
    ],
    "headings": [
        "# Guide\n\n## Installation on Linux\n\nRun the first command.",
        " It takes some time.\n\n",
        "How do I pay for it? \nYou pay with a card.",
        " Cash is not taken.\n\n",
        "1.2. Results\n\nThey were good enough.",
    ],
    "list": ["- one thing to do\n", "- another thing that is\n  wrapped over two lines\n", "* the third thing here"],
    "numbered list": ["1. Open the left door.\n", "2. Close the right door.\n", "a) Or leave both open."],
    "rows": [
        "name,age,city\nAlice Smith,34,Paris\n",
        "Bob Jones,45,Rome\n",
        "Carol King,29,Oslo\n",
        "Dan Brown,51,Bonn\n",
    ],
    "log": [
        "2024-01-05 12:00:01 INFO server started on port 80\n2024-01-05 12:00:02 WARN disk almost full at 91%\n",
        "2024-01-05 12:00:05 ERROR cannot open the file\n",
        "2024-01-05 12:00:09 INFO trying it again\n",
    ],
    "dialogue": [
        "Alice: Did you see the red house on the hill?\nBob: Yes.\n",
        "Alice: What did you think of it?\n",
        "Bob: That it is far too large.",
        " And it is red.\n",
    ],
    "JSON": [
        '[\n  {\n    "id": 1,\n    "name": "Alice Smith",\n    "email": "alice@example.com",\n'
        '    "address": "1 Long Street, Paris, France"\n  },\n',
        '  {\n    "id": 2,\n    "name": "Bob Jones",\n    "email": "bob@example.com",\n'
        '    "address": "2 Short Street, Rome, Italy"\n  }\n]\n',
    ],
    "code": [
        "def area(width, height):\n    if width < 0:\n        raise ValueError(width)\n    return width * height\n\n\n",
        "def volume(width, height, depth):\n    return area(width, height) * depth\n",
    ],
    "fragments": [
        "The show was well received by critics.",
        " It won some awards.\n</\n<\n",
        "The next season was the last one.",
    ],
    "few words": ["No. It is not what he wanted.", " Why? Because of the rain that fell."],
    "no": [
        "He read the answer, and it was no.",
        " Then he saw No. 5 and nos. 7 to 9 of Case No. CV-2024.",
        " It was No. XII here.",
    ],
    "Chinese": ["今天天气很好。", "我们去公园吧！", "他说：“不行。”", "然后走了。"],
    "Chinese lines": ["春眠不觉晓，\n处处闻啼鸟。\n", "夜来风雨声，\n", "花落知多少。"],
    "wrapped Chinese": [
        "臣亮言：先帝创业未半而中道崩殂，今天下三分，\n益州疲弊，此诚危急存亡之秋也。",
        "然侍卫之臣不懈于\n内，忠志之士忘身于外者。",
    ],
    "Chinese with English": [
        "公司成立于2005年，总部在ABC123科技园区，主要从事软件与硬件\n开发与服务业务以及相关的技术咨询，客户包括很多大型企业与学\n校。",
    ],
    "Hebrew": ["הלכתי אל החנות הגדולה שליד הבית\nכדי לקנות תפוחים\nואחר כך חזרתי הביתה."],
    "German": [
        "Der Vertrag endet z. B. im Mai, d. h. vor Ablauf der Frist.",
        " Das Schreiben ist an die Stadt zu richten.",
    ],
}


@pytest.mark.parametrize("kind", _PARTS)
def test_passages(kind):
    parts = _PARTS[kind]
    text = "".join(parts)
    starts = [0, *chunking.passage_ends(text).tolist()]
    assert [text[start:end] for start, end in itertools.pairwise(starts)] == parts


@given(st.text(alphabet="aB1 .\n\r\t!?。,:;(){}[]#-*|\"'é中😀", max_size=200))
def test_every_character_is_in_one_passage(text):
    ends = chunking.passage_ends(text)
    assert (np.diff(ends, prepend=0) > 0).all()
    assert (ends[-1] if len(ends) else 0) == len(text)


@given(st.lists(st.sampled_from(["a", "It is.", "-", "</", "7", "Two words"]), min_size=2), st.sampled_from("\n "))
def test_no_passage_is_a_fragment(pieces, between):
    """Fewer than three words of fewer than twelve letters stand alone only if nothing else is there."""
    text = between.join(pieces)
    starts = [0, *chunking.passage_ends(text).tolist()]
    found = [text[start:end] for start, end in itertools.pairwise(starts)]
    for passage in found if len(found) > 1 else ():
        words = re.findall(r"[^\W_]+", passage)
        assert len(words) >= 3 or sum(map(len, words)) >= 12


@pytest.mark.parametrize(
    "unit",
    [
        *("word ", "It is so. ", "\n", " \n", "(", "[]{}()\n", "1", "1. ", ".", ". ", "; ", "😀", "e\u0301", '"', '."'),
        *("a,b\n", "J. ", "a.", " ." + " " * 500, ";" + " " * 1000, "x" * 5000 + "\n", "ab cd ef.\r\n\r\n", "a: b\n"),
    ],
)
def test_time_grows_with_the_length_alone(unit):
    """A text ten times as long takes about ten times as long; the bound leaves room for slow and busy machines."""

    def seconds(characters: int) -> float:
        text = (unit * (characters // len(unit) + 1))[:characters]
        begun = time.process_time()
        chunking.passage_ends(text)
        return time.process_time() - begun

    assert seconds(1_000_000) < 40 * max(seconds(100_000), 0.01)
