"""What a person meets at a terminal: text that tries to command it, Ctrl-C, narrow windows, streams that are closed."""

import json
import os
import pathlib
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import gguf_files
import numpy as np
import pytest
from commands import gemfilter
from model_files import GOLDEN, Folder
from pseudo_terminal import GEMFILTER, Seen, Terminal, lines, on_terminal

from gemfilter_jax.errors import visible

_SHOWN = {"\x1b]0;title\x07": r"\x1b]0;title\x07", "\x1b[2J": r"\x1b[2J", "\x9b31m": r"\x9b31m"} | {
    "a\bb": r"a\x08b",
    "1\r2": r"1\r2",
}
_HOSTILE = " ab ".join(_SHOWN)
_DOCUMENT = f"ab {_HOSTILE} 12 b\n" * 12
_BOOK = "ab a 12 b " * 40
_ANSWERING = ("--keep=48", "--filter_layer=1", "--max_new_tokens=12")

_HIDE, _SHOW = "\x1b[?25l", "\x1b[?25h"
_COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:[34][0-8]|9\d|10[0-7])[;\d]*m")


def _assert_shown(text: str, sequences: dict[str, str]) -> None:
    """Control sequences stand in what a terminal was sent as escapes, and never as themselves."""
    for raw, escaped in sequences.items():
        assert raw not in text, raw
        assert escaped in text, escaped
    assert not re.search(r"[\x00-\x06\x07\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f]|\x1b\]", text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("terminal")
    (folder / "hostile.txt").write_bytes(_DOCUMENT.encode())
    (folder / "book.txt").write_text(_BOOK)
    return folder


@pytest.fixture(scope="module")
def book(model_file, folder) -> tuple[str, ...]:
    """Flags of a short answer about a harmless text."""
    return (f"--model={model_file}", f"--prompt_file={folder / 'book.txt'}", *_ANSWERING)


@pytest.fixture(scope="module")
def hostile_model_file(tmp_path_factory) -> pathlib.Path:
    """A model that writes control sequences: they take the place of the words that it likes best."""
    tokens = list(gguf_files.TOKENS)
    for index, token in enumerate(tokens):
        if token.startswith("<unused"):
            tokens[index] = f"\x1b[{index}C\x9b{index}m"
    path = tmp_path_factory.mktemp("hostile") / "tiny.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_files, "TOKENS", tokens)
        return gguf_files.write(path, Folder.read(GOLDEN / "llama_gqa_tied"))


class _HostileRuns(NamedTuple):
    """What becomes of a hostile document, of hostile questions, and of the answers of a hostile model."""

    generate: Seen
    generate_without_colour: Seen
    chat_on_dumb_terminal: Seen
    select: Seen
    answers: subprocess.CompletedProcess
    kept: subprocess.CompletedProcess
    kept_as_json: subprocess.CompletedProcess


@pytest.fixture(scope="module")
def hostile_runs(hostile_model_file, folder) -> _HostileRuns:
    document = (f"--model={hostile_model_file}", f"--prompt_file={folder / 'hostile.txt'}", "--nochat_template")
    kept = (*document, "--keep=200", "--filter_layer=1")
    answered = (*kept, "--max_new_tokens=12", "--show_kept")
    asked = ("generate", *answered, f"--question={_HOSTILE}", f"--question=12 {_HOSTILE}")
    select = ("select", *kept, "--question=12 ab")
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(on_terminal, "generate", *answered, "--question=12 ab"),
            pool.submit(on_terminal, *asked, NO_COLOR="1"),
            pool.submit(on_terminal, "chat", *answered, TERM="dumb", typed="12 ab\n\x04"),
            pool.submit(on_terminal, *select),
            pool.submit(gemfilter, *asked),
            pool.submit(gemfilter, *select),
            pool.submit(gemfilter, *select, "--format=json"),
        ]
    return _HostileRuns(*(run.result() for run in runs))


@pytest.mark.parametrize("run", ["generate", "generate_without_colour", "chat_on_dumb_terminal", "select"])
def test_a_terminal_shows_control_sequences_and_does_not_obey_them(hostile_runs, run):
    """Of kept passages; Ctrl-D ends the chat."""
    seen = getattr(hostile_runs, run)
    assert seen.status == 0
    _assert_shown(seen.text, _SHOWN)


def test_a_terminal_shows_the_control_sequences_of_questions_and_answers(hostile_runs):
    answers = re.findall(r"^> (.*)", hostile_runs.answers.stdout.decode(), re.MULTILINE)
    assert len(answers) == 2
    assert all(answer.count("\x1b[") == answer.count("\x9b") > 2 for answer in answers), answers
    shown = lines(hostile_runs.generate_without_colour.text)
    for text in (_HOSTILE, f"12 {_HOSTILE}", *(f"> {answer}" for answer in answers)):
        assert visible(text) in shown
        assert text in hostile_runs.answers.stdout.decode()
    for run in (hostile_runs.generate, hostile_runs.chat_on_dumb_terminal):
        assert re.search(r"(\\x1b\[\d+C\\x9b\d+m){2}", run.text)


def test_no_color_and_dumb_terminals_are_respected(hostile_runs):
    assert _COLOUR.search(hostile_runs.generate.text)
    assert _COLOUR.search(hostile_runs.select.text)
    assert not _COLOUR.search(hostile_runs.generate_without_colour.text)
    assert "\x1b" not in hostile_runs.chat_on_dumb_terminal.text


def test_select_writes_into_a_file_what_it_kept_as_it_is(hostile_runs):
    kept = json.loads(hostile_runs.kept_as_json.stdout)
    assert kept["passages"] == [_DOCUMENT[start:end] for start, end in kept["spans"]]
    assert all(raw in kept["text"] for raw in _SHOWN)
    assert hostile_runs.kept.stdout == f"{kept['text']}\n".encode()


_EVALUATION = ("--lengths=150", "--method=full,bm25", "--keep=64", "--count=20", "--nochat_template")


def _command(name: str, model_file: pathlib.Path, folder: pathlib.Path, book: tuple[str, ...]) -> tuple[str, ...]:
    """A command that is interrupted, with all that it writes in a folder."""
    output = f"--output={folder / 'output'}"
    match name:
        case "generate":
            return ("generate", *book, "--question=12 ab", f"--report={folder / 'output'}")
        case "chat":
            return ("chat", *book, f"--document_cache={folder / 'output'}")
        case "evaluate":
            return ("evaluate", f"--model={model_file}", "--task=hidden_facts", *_EVALUATION, output)
        case "prompts":
            (folder / "requests").mkdir(exist_ok=True)
            texts = [" ".join(np.random.default_rng(seed).choice(["ab", "a", "12", "2"], 38)) for seed in range(24)]
            asked = folder / "requests" / "requests.jsonl"
            asked.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
            return ("generate", f"--model={model_file}", f"--prompts={asked}", "--batch=2", *_ANSWERING, output)
        case _:
            return ("convert", f"--model={model_file}", output)


# What each writes last.
_LAST = {
    "generate": "tokenize ",
    "chat": "tokenize ",
    "evaluate": "└",
    "prompts": "already there ",
    "convert": "/output\r\n",
}
_RESUMED = ("evaluate", "prompts")


def _results(output: pathlib.Path) -> list[dict]:
    """The lines of an output but for what no two runs have in common."""
    found = [json.loads(line) for line in output.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("timings", "seconds")} for line in found]


@pytest.fixture(scope="module")
def whole_runs(model_file, book, tmp_path_factory) -> dict[str, tuple[Seen, pathlib.Path]]:
    """What commands show when nothing interrupts them, and the folders that they write to."""

    def run(name: str) -> tuple[Seen, pathlib.Path]:
        folder = tmp_path_factory.mktemp(name)
        seen = on_terminal(*_command(name, model_file, folder, book))
        assert seen.status == 0, seen
        assert _LAST[name] in seen.text
        return seen, folder

    with ThreadPoolExecutor(2) as pool:
        names = [name for name in _LAST if name != "chat"]
        return dict(zip(names, pool.map(run, names), strict=True))


# Seconds. Before them Python starts, and may answer a Ctrl-C in its own ways; the last moments seen were at 0.035.
_FIRST_MOMENT = 0.15
# Seconds that a command may take to end. It takes some 0.05; a machine with other work may not run it for a while.
_SOON = 2
_INTERRUPTED = {signal.SIGINT: 130, signal.SIGTERM: 143}


def _stop(terminal: Terminal, number: signal.Signals) -> Seen:
    """Interrupt a command, which ends soon and leaves the terminal as it should be."""
    sent = time.monotonic()
    terminal.send(number)
    seen = terminal.finish()
    assert time.monotonic() - sent < _SOON
    assert "Traceback" not in seen.text
    assert "Exception ignored" not in seen.text
    assert seen.text.rfind(_SHOW) >= seen.text.rfind(_HIDE)
    return seen


def _interrupt(name: str, command: tuple[str, ...], folder: pathlib.Path, moment: float) -> bool:
    """Interrupt a command at a moment; whether it was still at work."""
    with Terminal(*command) as terminal:
        terminal.type("12 ab\n" if name == "chat" else "")
        running = terminal.sleep_until(moment)
        seen = _stop(terminal, signal.SIGINT) if running else terminal.finish()
    assert not list(folder.rglob(".gemfilter.*"))
    if _LAST[name] in seen.text and name != "chat":  # nothing is left to be stopped
        assert seen.status in (0, 130, -signal.SIGINT)
        return False
    # Killed by the signal itself, it had not come to the code that answers, and had shown nothing.
    assert seen.status == 130 or (seen.status == -signal.SIGINT and not seen.text and moment < 1), (moment, seen)
    return True


def _check_interruptions(name: str, count: int, model_file, book, whole_runs, folder: pathlib.Path) -> None:
    """Interrupt a command at random moments of a run; what it wrote is taken up, or whole, or not there."""
    whole, its_folder = whole_runs["generate" if name == "chat" else name]
    parts = (np.arange(count) + np.random.default_rng(count).uniform(size=count)) / count
    at_work = []
    for number, moment in enumerate(map(float, _FIRST_MOMENT + parts * (whole.seconds - _FIRST_MOMENT))):
        own = folder if name in _RESUMED else folder / str(number)
        own.mkdir(exist_ok=True)
        at_work.append(_interrupt(name, _command(name, model_file, own, book), own, moment))
        if name == "convert" and (own / "output").exists():
            assert _names(own / "output") == _names(its_folder / "output")
    assert any(at_work)
    if name in _RESUMED:
        done = gemfilter(*_command(name, model_file, folder, book))
        assert done.returncode == 0, done.stderr
        assert _results(folder / "output") == _results(its_folder / "output")


def _names(folder: pathlib.Path) -> set[pathlib.Path]:
    return {path.relative_to(folder) for path in folder.iterdir()}


@pytest.fixture(scope="module")
def interruptions(model_file, book, whole_runs, tmp_path_factory):
    """The outcomes of three interruptions of each command, two commands at a time."""

    def check(name: str) -> None:
        _check_interruptions(name, 3, model_file, book, whole_runs, tmp_path_factory.mktemp(f"interrupted_{name}"))

    with ThreadPoolExecutor(2) as pool:
        return {name: pool.submit(check, name) for name in ("evaluate", "prompts", "generate", "chat", "convert")}


@pytest.mark.parametrize("name", _LAST)
def test_ctrl_c_at_any_moment_ends_a_command_at_once(interruptions, name):
    interruptions[name].result()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", _LAST)
def test_ctrl_c_at_many_moments_ends_a_command_at_once(name, model_file, book, whole_runs, tmp_path):
    _check_interruptions(name, 20, model_file, book, whole_runs, tmp_path)


@pytest.mark.parametrize(("name", "number"), [("generate", signal.SIGINT), ("prompts", signal.SIGTERM)])
def test_the_cursor_comes_back_when_a_progress_bar_is_interrupted(name, number, model_file, book, tmp_path):
    with Terminal(*_command(name, model_file, tmp_path, book)) as terminal:
        terminal.wait_for(_HIDE)
        seen = _stop(terminal, number)
    assert seen.status == _INTERRUPTED[number]
    assert seen.text.rfind(_SHOW) > seen.text.rfind(_HIDE) >= 0


@pytest.mark.parametrize("number", _INTERRUPTED)
def test_an_evaluation_says_how_it_goes_on(number, model_file, book, whole_runs, tmp_path):
    output = tmp_path / "output"
    with Terminal(*_command("evaluate", model_file, tmp_path, book)) as terminal:
        while not output.exists() or output.read_bytes().count(b"\n") < 3:
            assert terminal.process.poll() is None
            time.sleep(0.005)
        seen = _stop(terminal, number)
    assert seen.status == _INTERRUPTED[number]
    assert lines(seen.text)[-2:] == [f"stopped; the same command goes on from {output}", ""]
    so_far, whole = _results(output), _results(whole_runs["evaluate"][1] / "output")
    assert 3 <= len(so_far) < len(whole)
    assert so_far == whole[: len(so_far)]


def test_ctrl_c_between_the_questions_of_a_chat_ends_it(book):
    with Terminal("chat", *book) as terminal:
        terminal.wait_for("? ")
        assert _stop(terminal, signal.SIGINT).status == 130


def test_a_window_made_narrow_changes_no_answer(book, whole_runs, tmp_path):
    whole, _ = whole_runs["generate"]
    answer = next(line for line in lines(whole.text) if line.startswith("<unused"))
    with Terminal("generate", *book, "--question=12 ab") as terminal:
        terminal.wait_for(_HIDE)
        for columns in (20, 3, 20):
            terminal.resize(columns)
            time.sleep(0.1)
        seen = terminal.finish()
    assert seen.status == 0
    assert answer in lines(seen.text)
    assert "Traceback" not in seen.text


def _in_shell(redirected: str, *arguments: str) -> subprocess.CompletedProcess:
    """A command with redirections that a shell makes."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirected}', "sh", *GEMFILTER, *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def _assert_one_line(done: subprocess.CompletedProcess, said: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert said in done.stderr


@pytest.mark.parametrize(
    ("redirected", "arguments", "said"),
    [
        ("<&-", ("generate",), "no prompt"),
        ("<&-", ("select",), "no prompt"),
        ("<&-", ("chat", "--prompt_file=book.txt"), "standard input is closed"),
        (">&-", ("generate", "--prompt_file=book.txt"), "standard output is closed"),
        (">&-", ("chat", "--prompt_file=book.txt"), "standard output is closed"),
        (">&-", ("select", "--help"), "standard output is closed"),
    ],
)
def test_a_closed_stream_is_a_mistake_told_in_one_line(redirected, arguments, said):
    _assert_one_line(_in_shell(redirected, *arguments), said)


@pytest.fixture(scope="module")
def redirected(book) -> dict[str, subprocess.CompletedProcess]:
    """Answers with closed or full streams, and a chat with questions that cannot be asked."""
    without_answer = [flag for flag in book if not flag.startswith("--max_new_tokens")]
    typed = b"12 \xff\n12 ab\n" + b"a" * 3_000_000 + b"\n12 ab\n\n12 ab\n"
    with ThreadPoolExecutor(2) as pool:
        runs = {
            "chat": pool.submit(gemfilter, "chat", *book, stdin=typed),
            "no errors": pool.submit(_in_shell, "2>&-", "generate", *book, "--question=12 ab"),
            "generate": pool.submit(_in_shell, ">/dev/full", "generate", *book, "--question=12 ab"),
            "select": pool.submit(_in_shell, ">/dev/full", "select", *without_answer, "--question=12 ab"),
        }
    return {name: run.result() for name, run in runs.items()}


def test_an_answer_needs_no_standard_error(redirected, whole_runs):
    done = redirected["no errors"]
    assert done.returncode == 0
    (answer,) = done.stdout.splitlines()
    assert answer in lines(whole_runs["generate"][0].text)
    assert len(answer) > 20


def test_a_mistake_that_cannot_be_told_is_not_told_as_an_answer():
    done = _in_shell("2>&-", "generate", "--nonsense")
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("generate", "--help"), ("plan", "--help")])
def test_a_reader_who_has_gone_is_no_mistake(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run([*GEMFILTER, *arguments], stdout=writing, stderr=subprocess.PIPE, timeout=60)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("arguments", [(), ("generate",)])
def test_the_first_line_of_the_help_is_all_that_head_shows(arguments):
    pipe = '{ "$@" --help; echo "status $?" >&2; } | head -1'
    done = subprocess.run(
        ["sh", "-c", pipe, "sh", *GEMFILTER, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == "status 0\n"
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("name", ["--help", "generate --help", "compare", "compare --format=json"])
def test_a_full_disk_is_told_in_one_line(name, whole_runs):
    compared = [str(whole_runs["evaluate"][1] / "output")] if name.startswith("compare") else []
    _assert_one_line(_in_shell(">/dev/full", *name.split(), *compared), "No space left on device")


@pytest.mark.parametrize("name", ["generate", "select"])
def test_an_answer_for_a_full_disk_is_told_in_one_line(redirected, name):
    _assert_one_line(redirected[name], "No space left on device")


def test_a_chat_goes_on_after_questions_that_cannot_be_asked(redirected):
    """After a line that is not UTF-8 and one of 3 MB; an empty line ends it."""
    done = redirected["chat"]
    told = done.stderr.decode().splitlines()
    assert done.returncode == 0
    assert told[0] == "the question: not UTF-8 (byte 0xff at offset 3)"
    assert "Traceback" not in done.stderr.decode()
    assert sum("keep more than that" in line for line in told) == 3
    first, second = done.stdout.decode().splitlines()
    assert first == second != ""
    assert sum(line.startswith("tokenize ") for line in told) == 2
