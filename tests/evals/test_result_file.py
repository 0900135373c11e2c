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

from gemfilter_jax import files
from gemfilter_jax.errors import UserError
from gemfilter_jax.evals import result_file
from gemfilter_jax.evals.example import Example, Outcome
from gemfilter_jax.evals.result_file import Line
from gemfilter_jax.evals.runner import Contestant, Trial
from gemfilter_jax.methods.full import Full

HEADING = {
    "command": "evaluate",
    "task": "needles",
    "parts": "depth",
    "lengths": [100],
    "trials": 3,
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
    with files.growing(path) as output:
        assert result_file.resume(output, heading, TRIALS).lines == ()
        for line in lines:
            result_file.append(output, line)
    return path


def resumed(path, heading=HEADING):
    with files.growing(path) as output:
        return result_file.resume(output, heading, TRIALS)


def test_a_line_says_what_was_asked_and_answered(path):
    text = write(path).read_text().splitlines()[1]
    assert json.loads(text) == {
        "length": 100, "number": 0, "method": "full", "keep": "all", "name": "n0",
        "digest": TRIALS[0].example.digest, "group": "50 %", "depth": 0.5,
        "tokens": 98, "question": "Where is 0?", "expected": ["a"], "answer": "an answer\n",
        "scores": {"right": 0.333333}, "prompt_tokens": 120, "seconds": {"prefill": 0.123}, "error": None,
        "recall_estimate": None,
    }  # fmt: skip
    assert result_file.read([path]) == result_file.ResultFile(HEADING, tuple(LINES))


def test_a_digest_is_of_the_whole_example():
    """Of equal examples it is equal in every process, so that runs of different days can be compared."""
    example = TRIALS[0].example
    assert example.digest == dataclasses.replace(example).digest == "f469b74bba2596bb"
    changes = {
        "text": "012345678X", "question": "Where?", "references": ("b",), "spans": ((5, 7),), "message_format": "{}",
        "plain": True, "name": "n", "group": "g", "tokens": 97,
    }  # fmt: skip
    others = {dataclasses.replace(example, **{name: value}).digest for name, value in changes.items()}
    assert len(others | {example.digest}) == len(changes) + 1


def test_a_run_goes_on_and_a_torn_line_is_cut_off(path):
    write(path, lines=LINES[:2])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"length": 100, "numb')
    elsewhere = HEADING | {"environment": {"device": "gpu"}}
    assert resumed(path, elsewhere).lines == tuple(LINES[:2])
    assert path.read_bytes() == whole


@pytest.mark.parametrize("left", [b"", b'{"com', b'{"command": "evaluate", "task": "nee'])
def test_a_torn_heading_is_written_anew(path, left):
    path.write_bytes(left)
    assert resumed(path).lines == ()
    assert json.loads(path.read_text()) == HEADING


@pytest.mark.parametrize(
    ("heading", "lines", "words"),
    [
        (HEADING | {"task": "ruler"}, LINES, 'its field \'task\' is "ruler", now it is "needles"'),
        (HEADING | {"shard": "1/2"}, LINES, "its field 'shard' is \"1/2\", now it is null"),
        (HEADING | {"more": 1}, LINES, "its field 'more' is 1, now it is null"),
        (
            HEADING | {"methods": [*HEADING["methods"], {"method": "bm25", "keep": 64, "options": {}}]},
            LINES,
            "its methods are full, bm25@64, now they are full; give a new file, which gemfilter compare takes beside",
        ),
        (
            HEADING | {"methods": [{"method": "full", "keep": "all", "options": {"seed": 1}}]},
            LINES,
            r"its field 'methods' is \[.*\"seed\": 1.*, now it is",
        ),
        (HEADING, LINES[1:], "line 2 is of another run"),
        (HEADING, [dataclasses.replace(LINES[0], number=1)], "line 2 is of another run"),
        (HEADING, [dataclasses.replace(LINES[0], length=99)], "line 2 is of another run"),
        (HEADING, [dataclasses.replace(LINES[0], method="bm25")], "line 2 is of another run"),
        (
            HEADING,
            [dataclasses.replace(LINES[0], digest="")],
            "line 2 is of another run, or of texts that have changed",
        ),
        (HEADING, [*LINES, LINES[0]], "has 4 results, the run has 3"),
    ],
)
def test_another_run_is_left_alone(path, heading, lines, words):
    before = write(path, heading, lines).read_bytes()
    with pytest.raises(UserError, match=words):
        resumed(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "held", [b"my notes", b'{"mine": 1}', b'{"command": "evaluate", "task": "mine", "precious": 1}']
)
def test_a_file_of_somebody_else_is_left_alone(path, held):
    path.write_bytes(held)
    with pytest.raises(UserError, match="is no file that gemfilter evaluate has written"):
        resumed(path)
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
            for changes in (
                *({"length": [1]}, {"expected": None}, {"scores": {"right": "x"}}, {"more": 1}),
                *({"scores": {"right": float("nan")}}, {"scores": {"right": 10**400}}, {"scores": {"right": -0.5}}),
                *(
                    {"tokens": 10**400},
                    {"prompt_tokens": -1},
                    {"seconds": {"filter": float("inf")}},
                    {"seconds": {"filter": -1}},
                    {"error": "and scores"},
                ),
            )
        ),
    ],
)
def test_a_damaged_line_is_told_with_its_number(path, damaged):
    before = write(path).read_bytes() + damaged
    path.write_bytes(before)
    for doing in (lambda: resumed(path), lambda: result_file.read([path])):
        with pytest.raises(UserError, match=r"results\.jsonl: line 5 is n"):
            doing()
    assert path.read_bytes() == before


def test_files_of_one_task_are_taken_together(tmp_path):
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    write(first, HEADING | {"shard": "1/2", "trials": 1}, LINES[:1])
    write(second, HEADING | {"shard": "2/2", "environment": {}, "trials": 2}, LINES[1:])
    together = result_file.read([first, second])
    assert together.lines == tuple(LINES)
    assert together.remarks == ()
    assert together.heading == HEADING | {"shard": "1/2, 2/2", "trials": 3}
    with pytest.raises(UserError, match=r"1\.jsonl: line 2 repeats a result of full for 'n0'"):
        result_file.read([first, first])
    again = write(tmp_path / "3.jsonl", HEADING, [dataclasses.replace(LINES[0], answer="another")])
    with pytest.raises(UserError, match=r"3\.jsonl: line 2 repeats a result of full for 'n0'"):
        result_file.read([first, again])
    of_another_text = [dataclasses.replace(LINES[0], digest="0", method="bm25")]
    other = write(tmp_path / "4.jsonl", HEADING, of_another_text)
    with pytest.raises(UserError, match=r"4\.jsonl: line 2: 'n0' is another example than the one in its place"):
        result_file.read([first, other])


@pytest.mark.parametrize("name", ["task", "model", "dtype", "weights", "chat_template", "message_format"])
def test_files_of_other_tasks_and_models_are_not_taken_together(name, tmp_path):
    first = write(tmp_path / "1.jsonl", lines=LINES[:1])
    other = not HEADING[name] if name == "chat_template" else "other"
    second = write(tmp_path / "2.jsonl", HEADING | {name: other}, LINES[1:])
    with pytest.raises(UserError, match=rf"2\.jsonl: its {name} is {other!r}, that of the first file"):
        result_file.read([first, second])


def test_a_method_has_the_same_options_in_all_files(tmp_path):
    """But for its budget: curves over budgets are of one method."""

    def written(keep, **options):
        method = {"method": "default", "keep": keep, "options": {"keep": keep, "share": None, **options}}
        lines = [dataclasses.replace(LINES[0], method="default", keep=keep)]
        return write(tmp_path / f"{keep}.jsonl", HEADING | {"methods": [method]}, lines)

    files = [written(100, filter_layer=1), written("auto", filter_layer=1, share=0.3)]
    assert [one["keep"] for one in result_file.read(files).heading["methods"]] == [100, "auto"]
    with pytest.raises(UserError, match=r"120\.jsonl: its options of default are \{'filter_layer': 2\}, those of the"):
        result_file.read([*files, written(120, filter_layer=2)])


def test_what_files_lack_is_told(tmp_path):
    torn, shard = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    write(torn, lines=LINES[:2])
    write(shard, HEADING | {"shard": "2/3", "trials": 1}, LINES[2:])
    assert result_file.read([torn, shard]).remarks == (
        f"{torn} is not finished: it has 2 of 3 results",
        "of 3 shards of a run only these are given: 2",
    )


@pytest.mark.parametrize(
    ("changes", "remarks"),
    [
        ({}, []),
        (
            {"methods": []},
            ["of 2 shards of a run only these are given: 1", "of 2 shards of a run only these are given: 2"],
        ),
        (
            {"lengths": [200]},
            ["of 2 shards of a run only these are given: 1", "of 2 shards of a run only these are given: 2"],
        ),
        (
            {"options": {"seed": 1}},
            [
                "of 2 shards of a run only these are given: 1",
                "of 2 shards of a run only these are given: 2",
                "files differ in seed: 0, 1",
            ],
        ),
    ],
)
def test_shards_are_of_one_run(changes, remarks, tmp_path):
    first = write(tmp_path / "1.jsonl", HEADING | {"shard": "1/2", "trials": 1}, LINES[:1])
    second = write(tmp_path / "2.jsonl", HEADING | {"shard": "2/2", "trials": 2} | changes, LINES[1:])
    assert list(result_file.read([first, second]).remarks) == remarks


def test_shards_are_in_order_of_their_numbers(tmp_path):
    shards = [
        write(tmp_path / f"{index}.jsonl", HEADING | {"shard": f"{index}/11", "trials": 0}, []) for index in (10, 2)
    ]
    assert result_file.read(shards).remarks == ("of 11 shards of a run only these are given: 2, 10",)


def test_lines_are_sorted_by_length_method_and_number(tmp_path):
    bm25 = [dataclasses.replace(one, method="bm25") for one in LINES]
    longer = [dataclasses.replace(one, length=200) for one in LINES]
    first = write(tmp_path / "1.jsonl", lines=[longer[0], LINES[2], bm25[0]])
    second = write(tmp_path / "2.jsonl", lines=[LINES[0], bm25[1], longer[2]])
    assert result_file.read([first, second]).lines == (LINES[0], LINES[2], bm25[0], bm25[1], longer[0], longer[2])


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (b"{}\n", "line 1 lacks a sound 'task'"),
        (b"", "line 1 is not JSON"),
        (json.dumps(HEADING | {"methods": [3]}).encode() + b"\n", "line 1 lacks a sound 'methods'"),
        (json.dumps(HEADING | {"trials": "3"}).encode() + b"\n", "line 1 lacks a sound 'trials'"),
        (json.dumps(HEADING | {"lengths": [[1]]}).encode() + b"\n", "line 1 lacks a sound 'lengths'"),
        (json.dumps(HEADING | {"shard": "1/02"}).encode() + b"\n", "line 1 lacks a sound 'shard'"),
        (json.dumps(HEADING | {"model": "\ud800"}).encode() + b"\n", "line 1 has half of a surrogate pair"),
    ],
)
def test_a_file_of_something_else_is_refused(path, held, words):
    path.write_bytes(held)
    with pytest.raises(UserError, match=words):
        result_file.read([path])
    with pytest.raises(UserError, match="expected a plain file"):
        result_file.read([path.parent])


@pytest.mark.exhaustive
@pytest.mark.parametrize("kills", [1, 10])
def test_a_run_that_is_killed_again_and_again_gives_the_lines_of_one_that_is_not(kills, tmp_path):
    model = gguf_files.write(tmp_path / "tiny.gguf", Folder.read(GOLDEN / "llama_gqa_tied"))
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    task = ("--task=hidden_facts", "--count=12", "--lengths=150")
    flags = (f"--model={model}", "--method=full,default,bm25", "--keep=64,96", *task)

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
        wanted = had + rng.randrange(1, (total - had) // (kills - kill + 1))
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
