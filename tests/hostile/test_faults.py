"""Full disks, and folders and homes that cannot be used: one line, and nothing lost."""

import json
import os
import pathlib
import resource
import subprocess
import sys
from collections.abc import Callable

import pytest

_TEXT = "ab 12 a b " * 60
_QUESTION = ("--question=ab", "--keep=80", "--filter_layer=1", "--max_new_tokens=2")
_SMALL = 4096  # bytes: less than a report, a model or the reading of a document


@pytest.fixture
def run(model_file, tmp_path):
    """Runs a command on the tiny model in a folder of its own; returns the process."""
    (tmp_path / "text.txt").write_text(_TEXT)

    def running(
        *arguments: str,
        limits: dict[int, int] | None = None,
        stdout: int | Callable = subprocess.PIPE,
        **environment: str | None,
    ) -> subprocess.CompletedProcess:
        def limit() -> None:
            for kind, most in (limits or {}).items():
                resource.setrlimit(kind, (most, most))

        merged = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), **environment}
        return subprocess.run(
            [sys.executable, "-m", "gemfilter_jax.cli.main", *(one.format(model=model_file) for one in arguments)],
            cwd=tmp_path,
            env={name: value for name, value in merged.items() if value is not None}
            | {"PYTHONPATH": os.pathsep.join([str(pathlib.Path.cwd()), os.environ.get("PYTHONPATH", "")])},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            preexec_fn=limit,
            text=True,
            timeout=200,
        )

    return running


def _fails(done: subprocess.CompletedProcess, *said: str) -> None:
    *before, last = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert last.startswith(("gemfilter ", "gemfilter:"))
    assert all(words in last for words in said), last
    assert all(line.startswith(("read ", "tokenize ", "no preset", "warning: ")) for line in before), before


def _left(folder: pathlib.Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"text.txt", "cache"}


_FULL = {resource.RLIMIT_FSIZE: _SMALL}
_ONE_TEXT = ("--model={model}", "--prompt_file=text.txt", *_QUESTION)


@pytest.mark.parametrize("command", ["generate", pytest.param("select", marks=pytest.mark.exhaustive)])
def test_a_report_on_a_full_disk(run, tmp_path, command):
    flags = [flag for flag in _ONE_TEXT if command == "generate" or "new_tokens" not in flag]
    (tmp_path / "page.html").write_text("before")
    whole = run(command, *flags)
    assert whole.returncode == 0, whole.stderr
    done = run(command, *flags, "--report=page.html", limits={resource.RLIMIT_FSIZE: 1000})
    _fails(done, "page.html: cannot be written (File too large)")
    assert done.stdout == whole.stdout
    assert (tmp_path / "page.html").read_text() == "before"
    assert _left(tmp_path) == {"page.html"}


def test_a_model_on_a_full_disk(run, tmp_path):
    _fails(run("convert", "--model={model}", "--output=converted", limits=_FULL), "converted: cannot be written")
    assert _left(tmp_path) == set()


def test_the_cache_of_a_document_on_a_full_disk_costs_no_answer(run, tmp_path):
    whole = run("generate", *_ONE_TEXT)
    done = run("generate", *_ONE_TEXT, "--document_cache=readings", limits=_FULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout == whole.stdout != ""
    assert "readings: the reading of the document is not kept there" in done.stderr
    assert list((tmp_path / "readings").iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [("generate", *_ONE_TEXT), ("select", *_ONE_TEXT[:-1]), ("generate", "--help"), ("--help",)],
    ids=" ".join,
)
def test_a_full_standard_output(run, arguments):
    with open("/dev/full", "w") as full:
        _fails(run(*arguments, stdout=full), "standard output: No space left on device")


@pytest.mark.exhaustive
def test_requests_go_on_after_a_full_disk(run, tmp_path):
    lines = [{"prompt": _TEXT[: 200 + number], "question": "ab"} for number in range(6)]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ("--prompts=requests.jsonl", "--model={model}", "--keep=64", "--filter_layer=1", "--max_new_tokens=2")
    flags = (*flags, "--batch=1")
    assert run("generate", *flags, "--output=whole.jsonl").returncode == 0
    done = run("generate", *flags, "--output=answers.jsonl", limits={resource.RLIMIT_FSIZE: 2000})
    _fails(done, "answers.jsonl: cannot be written (File too large)")
    held = (tmp_path / "answers.jsonl").read_text()
    assert held.endswith("\n")
    assert 0 < held.count("\n") < 6
    assert run("generate", *flags, "--output=answers.jsonl").returncode == 0
    answers, whole = (
        [json.loads(line) | {"timings": None} for line in (tmp_path / name).read_text().splitlines()]
        for name in ("answers.jsonl", "whole.jsonl")
    )
    assert answers == whole
    assert (tmp_path / "answers.jsonl").read_text().startswith(held)


@pytest.mark.exhaustive
def test_an_evaluation_goes_on_after_a_full_disk(run, tmp_path):
    flags = (
        "--model={model}",
        "--nochat_template",
        "--task=hidden_facts",
        "--lengths=150",
        "--method=bm25",
        "--keep=64",
    )
    flags = ("evaluate", *flags, "--count=6", "--noanswer")
    assert run(*flags, "--output=whole.jsonl").returncode == 0
    size = (tmp_path / "whole.jsonl").stat().st_size
    done = run(*flags, "--output=results.jsonl", limits={resource.RLIMIT_FSIZE: size * 2 // 3})
    _fails(done, "results.jsonl: cannot be written (File too large)")
    held = (tmp_path / "results.jsonl").read_text()
    assert held.endswith("\n")
    assert 1 < held.count("\n") < 7
    assert run(*flags, "--output=results.jsonl").returncode == 0
    results = (tmp_path / "results.jsonl").read_text()
    assert results.startswith(held)
    assert results.count("\n") == 7


_more_homes = [pytest.param(home, marks=pytest.mark.exhaustive) for home in (None, "/nonexistent")]


@pytest.mark.parametrize("home", ["/dev/null", *_more_homes], ids=str)
def test_a_home_that_cannot_be_used(run, tmp_path, home):
    done = run("generate", *_ONE_TEXT, HOME=home, XDG_CACHE_HOME=None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["read", "tokenize"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_another_user(run, tmp_path):
    """What belongs to somebody else is told, and left as it is."""
    for name in ("page.html", "answers.jsonl"):
        (tmp_path / name).write_text("before")
        (tmp_path / name).chmod(0o444)
    tmp_path.chmod(0o555)
    code = """
import os, pathlib, sys
from gemfilter_jax import files
os.setuid(65534)
for check in (files.check_writable, files.check_folder):
    for name in ("page.html", "new"):
        try:
            check(name, "flag")
            print("taken", name)
        except files.UserError as error:
            print(error)
try:
    with files.growing(pathlib.Path("answers.jsonl")):
        print("taken")
except files.UserError as error:
    print(error)
"""
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert not [line for line in lines if line.startswith("taken")]
    assert all("Permission denied" in line or "is no folder" in line for line in lines), lines
    assert (tmp_path / "page.html").read_text() == "before"
