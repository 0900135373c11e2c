"""Result files: whole lines, runs that go on, files taken together, and what is refused."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import gguf_files
import pytest
from model_files import GOLDEN, Folder

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals import result_file
from gemfilter_jax.evals.example import Example, Outcome
from gemfilter_jax.evals.result_file import Line
from gemfilter_jax.evals.runner import Contestant, Trial
from gemfilter_jax.methods.full import Full

HEADING = {
    "command": "evaluate",
    "task": "needles",
    "title": "Needles",
    "main_score": "right",
    "options": {"seed": 0},
    "answer": True,
    "methods": [{"method": "full", "keep": "all", "options": {}}],
    "model": "m",
    "dtype": "float32",
    "weights": "float",
    "chat_template": True,
    "message_format": "{text}{question}",
    "shard": None,
    "environment": {"device": "cpu"},
}
ALL = Contestant("full", "all", Full())
TRIALS = [
    Trial(100, number, Example(f"n{number}", "0123456789", f"Where is {number}?", ("a",), 98, ((5, 6),), "50 %"), ALL)
    for number in range(3)
]
OUTCOME = Outcome("an answer\n", {"right": 1 / 3}, 120, {"prefill": 0.12345})
LINES = [Line.of(trial, OUTCOME) for trial in TRIALS]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.jsonl"


def write(path, heading=HEADING, lines=LINES):
    """A file as a run would leave it."""
    assert result_file.resume(path, heading, TRIALS).lines == ()
    for line in lines:
        result_file.append(path, line)
    return path


def test_a_line_says_what_was_asked_and_answered(path):
    text = write(path).read_text().splitlines()[1]
    assert json.loads(text) == {
        "length": 100, "number": 0, "method": "full", "keep": "all", "name": "n0", "group": "50 %", "depth": 0.5,
        "tokens": 98, "question": "Where is 0?", "expected": ["a"], "answer": "an answer\n",
        "scores": {"right": 0.333333}, "prompt_tokens": 120, "seconds": {"prefill": 0.123}, "error": None,
    }  # fmt: skip
    assert result_file.read([path]) == result_file.ResultFile(HEADING, tuple(LINES))


def test_a_run_goes_on_and_a_torn_line_is_cut_off(path):
    write(path, lines=LINES[:2])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"length": 100, "numb')
    elsewhere = HEADING | {"environment": {"device": "gpu"}}
    assert result_file.resume(path, elsewhere, TRIALS).lines == tuple(LINES[:2])
    assert path.read_bytes() == whole


@pytest.mark.parametrize("left", [b"", b'{"com', b'{"command": "evaluate", "task": "nee'])
def test_a_torn_heading_is_written_anew(path, left):
    path.write_bytes(left)
    assert result_file.resume(path, HEADING, TRIALS).lines == ()
    assert json.loads(path.read_text()) == HEADING


@pytest.mark.parametrize(
    ("heading", "lines", "words"),
    [
        (HEADING | {"task": "ruler"}, LINES, 'its task is "ruler", now it is "needles"'),
        (HEADING | {"shard": "1/2"}, LINES, 'its shard is "1/2", now it is null'),
        (HEADING | {"more": 1}, LINES, "its more is 1, now it is null"),
        (HEADING, LINES[1:], "line 2 is of another run"),
        (HEADING, [dataclasses.replace(LINES[0], method="bm25")], "line 2 is of another run"),
        (HEADING, [dataclasses.replace(LINES[0], question="Who?")], "line 2 is of another run"),
        (HEADING, [*LINES, LINES[0]], "has 4 results, the run has 3"),
    ],
)
def test_another_run_is_left_alone(path, heading, lines, words):
    before = write(path, heading, lines).read_bytes()
    with pytest.raises(UserError, match=words):
        result_file.resume(path, HEADING, TRIALS)
    assert path.read_bytes() == before


@pytest.mark.parametrize("held", [b"my notes", b'{"mine": 1}'])
def test_a_file_of_somebody_else_is_left_alone(path, held):
    path.write_bytes(held)
    with pytest.raises(UserError, match="is no file that gemfilter evaluate has written"):
        result_file.resume(path, HEADING, TRIALS)
    assert path.read_bytes() == held


@pytest.mark.parametrize(
    "damaged",
    [
        b"no JSON\n",
        b"[1]\n",
        b'{"length": 3}\n',
        b"\xff\n",
        *(
            json.dumps(dataclasses.asdict(LINES[0]) | changes).encode() + b"\n"
            for changes in ({"length": [1]}, {"expected": None}, {"scores": {"right": "x"}}, {"more": 1})
        ),
    ],
)
def test_a_damaged_line_is_told_with_its_number(path, damaged):
    before = write(path).read_bytes() + damaged
    path.write_bytes(before)
    for doing in (lambda: result_file.resume(path, HEADING, TRIALS), lambda: result_file.read([path])):
        with pytest.raises(UserError, match=r"results\.jsonl: line 5 is n"):
            doing()
    assert path.read_bytes() == before


def test_a_file_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        result_file.resume(tmp_path / "missing" / "results.jsonl", HEADING, TRIALS)
    with pytest.raises(UserError, match="cannot be written"):
        result_file.append(tmp_path, LINES[0])


def test_files_of_one_task_are_taken_together(tmp_path):
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    write(first, HEADING | {"shard": "1/2"}, LINES[:1])
    write(second, HEADING | {"shard": "2/2", "environment": {}}, LINES[1:])
    assert result_file.read([first, second]).lines == tuple(LINES)
    with pytest.raises(UserError, match=r"1\.jsonl: line 2 repeats a result of full for 'n0'"):
        result_file.read([first, first])
    other = write(tmp_path / "3.jsonl", HEADING | {"options": {"seed": 1}}, LINES[1:])
    with pytest.raises(UserError, match=r"3\.jsonl: its options is \{'seed': 1\}, that of the first file"):
        result_file.read([first, other])
    methods = [{"method": "full", "keep": "all", "options": {"filter_layer": 7}}]
    other = write(tmp_path / "4.jsonl", HEADING | {"methods": methods}, LINES[1:])
    with pytest.raises(UserError, match=r"4\.jsonl: its options of full are \{'filter_layer': 7\}, those of the files"):
        result_file.read([first, other])
    asked_otherwise = [dataclasses.replace(LINES[0], question="Who?", method="bm25")]
    other = write(tmp_path / "5.jsonl", HEADING, asked_otherwise)
    with pytest.raises(UserError, match=r"5\.jsonl: line 2 asks something else"):
        result_file.read([first, other])


def test_lines_are_sorted_by_length_method_and_number(tmp_path):
    bm25 = [dataclasses.replace(one, method="bm25") for one in LINES]
    longer = [dataclasses.replace(one, length=200) for one in LINES]
    first = write(tmp_path / "1.jsonl", lines=[longer[0], LINES[2], bm25[0]])
    second = write(tmp_path / "2.jsonl", lines=[LINES[0], bm25[1], longer[2]])
    assert result_file.read([first, second]).lines == (LINES[0], LINES[2], bm25[0], bm25[1], longer[0], longer[2])


@pytest.mark.parametrize(("held", "words"), [(b"{}\n", "line 1 has no 'task'"), (b"", "line 1 is not JSON")])
def test_a_file_of_something_else_is_refused(path, held, words):
    path.write_bytes(held)
    with pytest.raises(UserError, match=words):
        result_file.read([path])
    with pytest.raises(UserError, match="cannot be read"):
        result_file.read([path.parent])


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.exhaustive)])
def test_a_run_that_is_killed_again_and_again_gives_the_lines_of_one_that_is_not(kills, tmp_path):
    model = gguf_files.write(tmp_path / "tiny.gguf", Folder.read(GOLDEN / "llama_gqa_tied"))
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    flags = (f"--model={model}", "--method=full,default,bm25", "--keep=64,96", "--lengths=150")

    def command(output) -> list[str]:
        run = [sys.executable, "-m", "gemfilter_jax.cli.main", "evaluate", "--filter_layer=1", "--nochat_template"]
        return [*run, *flags, f"--output={output}"]

    def lines(output) -> list[dict]:
        made = [json.loads(line) for line in output.read_text().splitlines()]
        return [line | {"seconds": None} for line in made]

    uncut, cut = tmp_path / "uncut.jsonl", tmp_path / "cut.jsonl"
    subprocess.run(command(uncut), env=environment, check=True, capture_output=True, timeout=300)
    total = len(lines(uncut)) - 1
    assert total == 12 * 5
    rng = random.Random(kills)
    for kill in range(kills):
        process = subprocess.Popen(command(cut), env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        had = cut.read_bytes().count(b"\n") if cut.exists() else 0
        wanted = had + rng.randrange(1, (total - had) // (kills - kill))
        deadline = time.monotonic() + 200
        while not cut.exists() or cut.read_bytes().count(b"\n") < wanted:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.random() / 50)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert cut.read_bytes().count(b"\n") <= total
    subprocess.run(command(cut), env=environment, check=True, capture_output=True, timeout=300)
    assert lines(cut) == lines(uncut)
