"""What a person sees: an answer that is streamed to a terminal stays on its line."""

import os
import pty
import re
import select
import subprocess
import sys
import time

import gguf_files
import pytest
from model_files import GOLDEN, Folder

_TEXT = "The harbour was quiet. The password of the old lighthouse is marigold. The boats slept. "
_QUESTION = "What is the password of the old lighthouse?"
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def _on_terminal(*arguments: str, typed: str = "") -> str:
    """What a command writes to a pseudo-terminal that is its standard input, output and error."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "gemfilter_jax.cli.main", *arguments]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "200", "LINES": "50"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True)
    os.close(theirs)
    if typed:
        os.write(ours, typed.encode())
    seen, deadline = b"", time.monotonic() + 200
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 1)[0]:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            seen += piece
    os.close(ours)
    assert process.wait(30) == 0, seen[-3000:]
    return seen.decode()


def _lines(seen: str) -> list[str]:
    """The lines that stay on the screen: without control sequences, and what a carriage return overwrites."""
    plain = _CONTROL.sub("", seen).replace("\r\n", "\n")
    return [line.rpartition("\r")[2] for line in plain.split("\n")]


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(_TEXT)
    return f"--prompt_file={path}"


def test_an_answer_of_a_text_within_keep_is_one_line(smollm2, book):
    answer = smollm2.generate(_TEXT, _QUESTION, max_new_tokens=12).text
    assert len(answer.split()) > 3
    seen = _on_terminal("generate", book, f"--question={_QUESTION}", "--max_new_tokens=12")
    assert answer in _lines(seen)
    assert "nothing to filter" in seen
    assert "picked" not in seen


def test_answers_of_questions_asked_together_are_one_line_each(smollm2, book, tmp_path):
    long = _TEXT * 20
    (tmp_path / "book.txt").write_text(long)
    questions = [_QUESTION, "Which boats slept?"]
    document = smollm2.document(long, method=smollm2.method(keep=200))
    answers = [document.ask(question, max_new_tokens=12).text for question in questions]
    flags = [f"--question={question}" for question in questions]
    lines = _lines(_on_terminal("generate", book, *flags, "--keep=200", "--max_new_tokens=12"))
    for answer in answers:
        assert f"> {answer}" in lines, (answer, lines)


def test_chat_answers_each_question_on_one_line(smollm2, book):
    answer = smollm2.generate(_TEXT, _QUESTION, max_new_tokens=12).text
    lines = _lines(_on_terminal("chat", book, "--max_new_tokens=12", typed=f"{_QUESTION}\n{_QUESTION}\n\n"))
    assert sum(line.endswith(answer) for line in lines) == 2


def test_no_blank_lines_open_standard_error(book):
    command = [sys.executable, "-m", "gemfilter_jax.cli.main", "generate", book, f"--question={_QUESTION}"]
    done = subprocess.run([*command, "--max_new_tokens=2"], capture_output=True, text=True, check=True, timeout=200)
    assert done.stderr.startswith("read ")
    assert "" not in done.stderr.rstrip("\n").split("\n")


def test_an_evaluation_shows_its_running_scores_and_the_time_left(tmp_path):
    model = gguf_files.write(tmp_path / "tiny.gguf", Folder.read(GOLDEN / "llama_gqa_tied"))
    seen = _on_terminal(
        *("evaluate", f"--model={model}", "--lengths=150", "--method=full,bm25", "--keep=64", "--count=12"),
        *("--nochat_template", "--task=hidden_facts", f"--output={tmp_path / 'results.jsonl'}"),
    )
    plain = _CONTROL.sub("", seen)
    assert re.search(r"asking .*24/24.* right: full \d\.\d\d, bm25@64 \d\.\d\d", plain)
    assert re.search(r"\d:\d\d:\d\d", plain)
    table = plain[plain.rindex("Hidden facts, ") :]
    for row in (r"│ full +│ +all │ +150 │ +12 │", r"│ bm25 +│ +64 │ +150 │ +12 │"):
        assert re.search(row, table)
    assert "asking" not in table
