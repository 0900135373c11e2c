"""What a person sees: an answer that is streamed to a terminal stays on its line."""

import re
import subprocess
import sys

import gguf_files
import pytest
from model_files import GOLDEN, Folder
from pseudo_terminal import lines, on_terminal, plain

_TEXT = "The harbour was quiet. The password of the old lighthouse is marigold. The boats slept. "
_QUESTION = "What is the password of the old lighthouse?"


def _seen(*arguments: str, typed: str = "") -> str:
    seen = on_terminal(*arguments, typed=typed)
    assert seen.status == 0, seen.text[-3000:]
    return seen.text


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(_TEXT)
    return f"--prompt_file={path}"


def test_an_answer_of_a_text_within_keep_is_one_line(smollm2, book):
    answer = smollm2.generate(_TEXT, _QUESTION, max_new_tokens=12).text
    assert len(answer.split()) > 3
    seen = _seen("generate", book, f"--question={_QUESTION}", "--max_new_tokens=12")
    assert answer in lines(seen)
    assert "nothing to filter" in seen
    assert "picked" not in seen


@pytest.mark.exhaustive
def test_answers_of_questions_asked_together_are_one_line_each(smollm2, book, tmp_path):
    long = _TEXT * 20
    (tmp_path / "book.txt").write_text(long)
    questions = [_QUESTION, "Which boats slept?"]
    document = smollm2.document(long, method=smollm2.method(keep=200))
    answers = [document.ask(question, max_new_tokens=12).text for question in questions]
    flags = [f"--question={question}" for question in questions]
    shown = lines(_seen("generate", book, *flags, "--keep=200", "--max_new_tokens=12"))
    for answer in answers:
        assert f"> {answer}" in shown, (answer, shown)


def test_chat_answers_each_question_on_one_line(smollm2, book):
    answer = smollm2.generate(_TEXT, _QUESTION, max_new_tokens=12).text
    shown = lines(_seen("chat", book, "--max_new_tokens=12", typed=f"{_QUESTION}\n{_QUESTION}\n\n"))
    assert sum(line.endswith(answer) for line in shown) == 2


def test_no_blank_lines_open_standard_error(book):
    command = [sys.executable, "-m", "gemfilter_jax.cli.main", "generate", book, f"--question={_QUESTION}"]
    done = subprocess.run([*command, "--max_new_tokens=2"], capture_output=True, text=True, check=True, timeout=200)
    assert done.stderr.startswith("read ")
    assert "" not in done.stderr.rstrip("\n").split("\n")


def test_an_evaluation_shows_its_running_scores_and_the_time_left(tmp_path):
    model = gguf_files.write(tmp_path / "tiny.gguf", Folder.read(GOLDEN / "llama_gqa_tied"))
    seen = _seen(
        *("evaluate", f"--model={model}", "--lengths=150", "--method=full,bm25", "--keep=64", "--count=12"),
        *("--nochat_template", "--task=hidden_facts", f"--output={tmp_path / 'results.jsonl'}"),
    )
    shown = plain(seen)
    assert re.search(r"asking .*24/24.* right: full \d\.\d\d, bm25@64 \d\.\d\d", shown)
    assert re.search(r"\d:\d\d:\d\d", shown)
    table = shown[shown.rindex("Hidden facts, ") :]
    for row in (r"│ full +│ +all │ +150 │ +12 │", r"│ bm25 +│ +64 │ +150 │ +12 │"):
        assert re.search(row, table)
    assert "asking" not in table
