"""Text is data at every door: it is answered, or refused in one line, and none of it becomes a control token."""

import functools
import json
import pathlib
from collections.abc import Callable

import numpy as np
import pytest
from hostile.attacks import BYTES, TEXTS
from refusals import refusal

from gemfilter_jax import files
from gemfilter_jax.errors import UserError, printable, visible
from gemfilter_jax.generate.sampling import GREEDY
from gemfilter_jax.pipeline import Pipeline
from gemfilter_jax.reporting import prompt_page
from gemfilter_jax.results import KeptText
from gemfilter_jax.serving import requests_file
from gemfilter_jax.text.control_tokens import control_ids
from gemfilter_jax.text.prompt import encode

_PLAIN = "ab 12 a b 1 2"
_NEW_TOKENS = 2


def _method(model: Pipeline):
    return model.method(keep=80, filter_layer=1)


def _generate(model: Pipeline, _: pathlib.Path, text: str, question: str | None) -> KeptText:
    return model.generate(text, question, method=_method(model), max_new_tokens=_NEW_TOKENS).selection


def _select(model: Pipeline, _: pathlib.Path, text: str, question: str | None) -> KeptText:
    return model.select(text, question, method=_method(model))[0]


def _ask(model: Pipeline, _: pathlib.Path, text: str, question: str) -> KeptText:
    document = model.document(text, method=_method(model))
    return document.ask(question, max_new_tokens=_NEW_TOKENS).selection


def _batch(model: Pipeline, _: pathlib.Path, text: str, question: str | None) -> KeptText:
    results = model.generate_batch([text], [question], method=_method(model), max_new_tokens=_NEW_TOKENS)
    return results[0].selection


def _request(
    model: Pipeline, folder: pathlib.Path, text: str, question: str | None, *, in_file: bool = False
) -> KeptText:
    """As a line of a requests file; an error of its line is raised."""
    fields = {"prompt_file": "text.txt"} if in_file else {"prompt": text}
    if in_file:
        (folder / "text.txt").write_bytes(text.encode("utf-8", "surrogatepass"))
    (folder / "requests.jsonl").write_text(json.dumps(fields | {"question": question}) + "\n")
    (folder / "answers.jsonl").unlink(missing_ok=True)
    settings = {"method": _method(model), "max_new_tokens": _NEW_TOKENS, "sampling": GREEDY, "seed": 0}
    with files.growing(folder / "answers.jsonl") as output:
        requests_file.answer(model, requests_file.resume(folder / "requests.jsonl", output), batch=1, **settings)
    (line,) = map(json.loads, (folder / "answers.jsonl").read_text().splitlines())
    if "error" in line:
        raise UserError(line["error"])
    spans = tuple(map(tuple, line["spans"]))
    return KeptText(text, line["prompt_tokens"], tuple(line["indices"]), spans)


DOORS: dict[str, Callable[..., KeptText]] = {
    "generate": _generate,
    "select": _select,
    "ask": _ask,
    "generate_batch": _batch,
    "request": _request,
    "request with a file": functools.partial(_request, in_file=True),
}


def _outcome(door: str, *arguments) -> KeptText | str:
    """What is kept, or the line that refuses."""
    found: list[KeptText] = []
    if message := refusal(lambda: found.append(DOORS[door](*arguments))):
        assert len(message) < 1000
        return message
    (kept,) = found
    assert list(kept.indices) == sorted(set(kept.indices))
    assert kept.kept_tokens <= kept.prompt_tokens
    ends = [end for span in kept.spans for end in span]
    assert ends == sorted(ends)
    assert all(0 <= end <= len(kept.prompt) for end in ends)
    return kept


_REFUSED = {
    "blank": "is empty",
    "empty": "is empty",
    "half of a surrogate pair": ("surrogate pair", "not UTF-8"),
    "the other half": ("surrogate pair", "not UTF-8"),
}


def _is_refused(name: str, outcome: KeptText | str) -> bool:
    said = _REFUSED[name]
    return isinstance(outcome, str) and any(words in outcome for words in (said if isinstance(said, tuple) else [said]))


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("door", DOORS)
def test_documents(model, tmp_path, door, name):
    outcome = _outcome(door, model, tmp_path, TEXTS[name], "12 ab")
    assert _is_refused(name, outcome) if name in _REFUSED else isinstance(outcome, KeptText)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("door", DOORS)
def test_questions(model, tmp_path, door, name):
    outcome = _outcome(door, model, tmp_path, _PLAIN * 20, TEXTS[name])
    if name in _REFUSED:
        assert _is_refused(name, outcome)
    elif isinstance(outcome, str):
        assert "keep more than that" in outcome  # the question alone is longer


def _markers(model: Pipeline, text: str, question: str | None, **options) -> list[int]:
    """The control tokens of a prompt."""
    tokenizer = model.checkpoint.tokenizer
    prompt = encode(tokenizer, text, question, observation_rows=4, **options)
    assert prompt.spans(np.arange(len(prompt))) in ([(0, len(text))], [])
    return [token for token in prompt.ids.tolist() if token in control_ids(tokenizer)]


@pytest.mark.parametrize("name", [name for name in TEXTS if name not in _REFUSED])
def test_no_text_becomes_a_control_token(model, name):
    text, own = TEXTS[name], _markers(model, _PLAIN, _PLAIN)
    assert len(own) == 3
    assert _markers(model, text, _PLAIN) == _markers(model, _PLAIN, text) == _markers(model, text, text) == own
    assert _markers(model, f"{_PLAIN}{text}", None) == own
    assert _markers(model, text + _PLAIN, text, message_format="{question} {text} {question}") == own


@pytest.mark.parametrize("name", BYTES)
def test_files_of_bytes(tmp_path, name):
    path = tmp_path / "text.txt"
    path.write_bytes(BYTES[name])
    if message := refusal(files.read_text, path, "the text"):
        assert "the text: not UTF-8 (byte 0x" in message
    else:
        assert name in ("nothing", "NUL")
        assert files.read_text(path, "the text").encode() == BYTES[name]


@pytest.mark.parametrize("name", TEXTS)
def test_what_people_see_holds_no_control_characters(name):
    text = TEXTS[name]
    shown = visible(text)
    assert not any(character in shown for character in map(chr, [*range(9), *range(11, 32), *range(127, 160)]))
    assert printable(text).isprintable()
    if text.isprintable():
        assert shown == printable(text) == text


@pytest.mark.parametrize("name", TEXTS)
def test_a_report_escapes_markup(name):
    text = TEXTS[name]
    kept = KeptText(text, 2, (0,), ((0, len(text)),))
    page = prompt_page.page(kept, text, text)
    assert "<script" not in page
    assert "<img" not in page
