"""Requests and presets that were damaged at random: answered, or refused in one line."""

import copy
import json
import pathlib
from typing import Any

import pytest
import tiny
from hostile.attacks import TEXTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import places, refusal

from gemfilter_jax import files
from gemfilter_jax.config import ModelConfig
from gemfilter_jax.evals.jsonl import read
from gemfilter_jax.generate.sampling import GREEDY
from gemfilter_jax.methods import presets
from gemfilter_jax.methods.presets import preset_for, read_preset
from gemfilter_jax.serving import requests_file

_EXAMPLES = 800  # of each kind
_SMOLLM2 = ModelConfig("llama", 30, 576, 9, 3, 64, 1536, 49152, 8192, 1e-5, 1e5, tie_embeddings=True)

_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([2**31 - 1, 2**31, 2**63, 10**400, 1e308, 1e-320, float("nan"), float("inf"), -float("inf")]),
        st.floats(),
        st.text(max_size=20),
        st.sampled_from([*TEXTS.values(), "/dev/zero", "..", "17/0", "17/0:nan", "auto"]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def _damaged(draw, good: Any) -> bytes:
    """JSON with a value changed, removed, added or moved, or bytes of it changed."""
    fields = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        found = places(fields)
        if not found:
            break
        container, key = draw(st.sampled_from(found))
        match draw(st.integers(0, 3)):
            case 0 | 1:
                container[key] = draw(_values)
            case 2:
                del container[key]
            case 3 if isinstance(container, dict):
                container[draw(st.text(max_size=8))] = draw(_values)
    data = bytearray(json.dumps(fields).encode())
    if draw(st.integers(0, 3)) == 0 and data:
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


def _settings(factor: int):
    return settings(
        derandomize=True,
        deadline=None,
        max_examples=factor * _EXAMPLES,
        suppress_health_check=list(HealthCheck),
    )


_DEEP = b"[" * 100_000, b'{"a":' * 100_000, b'{"default": ' + b"[" * 5_000 + b"]" * 5_000 + b"}", b"1" * 10_000, b"\xff"
_PRESET = json.loads(presets.write_preset(preset_for(_SMOLLM2), _SMOLLM2))
_PRESET["recall"] = _PRESET["recall"][:2]


def _preset(path: pathlib.Path, data: bytes) -> None:
    path.write_bytes(data)
    if refusal(read_preset, path, _SMOLLM2) is None:
        read_preset(path, _SMOLLM2).default.fields  # noqa: B018 - what results say of it


def _presets(factor: int):
    @_settings(factor)
    @given(data=_damaged(_PRESET))
    def test(tmp_path, data):
        _preset(tmp_path / "preset.json", data)

    return test


test_presets = _presets(1)
test_many_presets = pytest.mark.exhaustive(_presets(20))


@pytest.mark.parametrize("data", [*_DEEP, b"", b"null", b"[]", b"{}", b"0"], ids=range(10))
def test_presets_that_are_none(tmp_path, data):
    (tmp_path / "preset.json").write_bytes(data)
    assert refusal(read_preset, tmp_path / "preset.json", _SMOLLM2)


class _Answers:
    """A model that answers at once, after the checks that come before its programs."""

    def __init__(self):
        self._model = tiny.pipeline(tiny.decoder())
        self.method = self._model.method(keep=32, filter_layer=1)

    def check(self, *arguments: Any) -> None:
        self._model.check(*arguments)

    def generate_batch(self, texts: list[str], questions: list[str | None], *, seed: list[int], **_: object) -> list:
        for text, question in zip(texts, questions, strict=True):
            self._model._encode(text, question, self.method)
        return [self for _ in texts]

    fields = {"text": ""}  # noqa: RUF012 - read only


_REQUEST = {"prompt": "w1 w2 w3", "question": "w4", "id": 7}
_OF_A_FILE = {"prompt_file": "book.txt", "question": "w4", "id": "x"}


def _answer(folder: pathlib.Path, lines: bytes) -> list[dict[str, Any]]:
    """The lines of the output of some requests."""
    asked, told = folder / "requests.jsonl", folder / "answers.jsonl"
    (folder / "book.txt").write_text("w1 w2")
    asked.write_bytes(lines)
    told.unlink(missing_ok=True)
    model: Any = _Answers()
    with files.growing(told) as output:
        run = requests_file.resume(asked, output)
        requests_file.answer(model, run, batch=4, method=model.method, max_new_tokens=2, sampling=GREEDY, seed=0)
    return [json.loads(line) for line in told.read_text().splitlines()]


def _requests(factor: int):
    @_settings(factor)
    @given(damaged=st.one_of(_damaged(_REQUEST), _damaged(_OF_A_FILE)))
    def test(tmp_path, damaged):
        line = damaged.replace(b"\n", b" ")
        good = json.dumps(_REQUEST).encode()
        answers = _answer(tmp_path, b"\n".join([good, line, good]))
        assert [answers[0].get("error"), answers[-1].get("error")] == [None, None]
        assert len(answers) == (3 if line.strip() else 2)
        assert all(one.get("error", "").isprintable() for one in answers)

    return test


test_requests = _requests(1)
test_many_requests = pytest.mark.exhaustive(_requests(20))


@pytest.mark.parametrize("data", _DEEP, ids=range(len(_DEEP)))
def test_requests_that_are_none(tmp_path, data):
    (answer,) = _answer(tmp_path, data)
    assert "the line" in answer["error"]


_QUESTIONS = {"input": "A text.", "instructions": ["What?"], "outputs": ["A text"]}


def _questions(factor: int):
    @_settings(factor)
    @given(data=_damaged(_QUESTIONS))
    def test(tmp_path, data):
        path = tmp_path / "questions.jsonl"
        path.write_bytes(data)

        def use() -> None:
            for line in read(str(path), "a document"):
                assert line.text("input").strip()
                assert all(line.texts("instructions") + line.texts("outputs"))

        refusal(use)

    return test


test_files_of_questions = _questions(1)
test_many_files_of_questions = pytest.mark.exhaustive(_questions(10))
