"""The check of a GPU, with a stand-in for Python that writes down its calls and takes its answers from the test."""

import os
import pathlib
import re
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "gpu_check.sh"
STAND_IN = """#!/bin/sh
case $1 in
-c)
    case $2 in
    *find_spec*) echo "$FAKE_MISSING" ;;
    *) echo "$FAKE_DEVICES" ;;
    esac
    ;;
*)
    echo "$*" >>"$LOG"
    case "$*" in
    *"$FAKE_FAILURE"*) exit 1 ;;
    esac
    ;;
esac
"""


@pytest.fixture
def check(tmp_path):
    """Run the script; its status, its errors and the calls of Python."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def run(*arguments: str, **environment: str) -> tuple[int, str, list[str]]:
        given = {"PYTHON": str(python), "LOG": str(log), "FAKE_DEVICES": "gpu 0.12.0 cuda:0", "FAKE_MISSING": ""}
        environment = os.environ | given | {"FAKE_FAILURE": "no call"} | environment
        done = subprocess.run([SCRIPT, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, done.stderr, log.read_text().splitlines() if log.exists() else []

    return run


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        ((), {"FAKE_DEVICES": "cpu 0.12.0 TFRT_CPU_0"}, "finds no GPU, only: cpu 0.12.0 TFRT_CPU_0"),
        ((), {"FAKE_DEVICES": ""}, "finds no GPU, only: nothing"),
        ((), {"FAKE_MISSING": "flax gguf"}, "lacks flax gguf; pip install"),
        ((), {"PYTHON": "python9"}, "python9 is missing"),
        (("--bench",), {}, "--bench: unknown"),
        (("bench", "one", "two"), {}, "two: unknown"),
        (("/proc/no",), {}, "/proc/no cannot be written"),
    ],
)
def test_what_is_missing_is_told_in_a_line_and_nothing_is_made(check, tmp_path, arguments, environment, said):
    status, errors, calls = check(*arguments, **environment)
    assert (status, calls) == (2, [])
    assert said in errors
    assert errors.startswith("gpu_check.sh: ")
    assert len(errors.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["python"]


def test_all_parts_run_and_a_failure_does_not_end_them(check, tmp_path):
    status, errors, calls = check("made", FAKE_FAILURE="bench_kernels.py")
    assert (status, errors.splitlines()[-1]) == (1, "gpu_check.sh: not passed: kernels")
    results = [re.findall(rf"{tmp_path}/made/(\S+)", call)[0] for call in calls]
    assert results == ["kernels.json", "needles.jsonl", "model.json", "bench.json", "long.json"]


@pytest.mark.parametrize(
    ("part", "results"),
    [
        ("kernels", ["kernels.json"]),
        ("model", ["needles.jsonl", "model.json"]),
        ("bench", ["bench.json"]),
        ("long", ["long.json"]),
    ],
)
def test_a_part_alone(check, tmp_path, part, results):
    status, errors, calls = check(part)
    assert (status, errors) == (0, f"{part}, results in {tmp_path}/gpu_check\n")
    assert [re.findall(rf"{tmp_path}/gpu_check/(\S+)", call)[0] for call in calls] == results


def test_parts_end_in_time():
    """Each under eight minutes, all under 25."""
    seconds = [int(one) for one in re.findall(r"^ .*\b(?:timeout|gemfilter|bench) (\d+) ", SCRIPT.read_text(), re.M)]
    kernels, needles, parity, bench, longest = seconds
    assert max(kernels, needles + parity, bench, longest) < 8 * 60
    assert sum(seconds) < 25 * 60
