"""The paper's runs as one command, on a tiny model."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import gguf_files
import pytest
from model_files import GOLDEN, Folder

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "reproduce_paper.sh"
LONGBENCH = ROOT / "tests" / "evals" / "task_files" / "longbench"


def reproduce(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = pathlib.Path(sys.executable).with_name("gemfilter")
    given = {"GEMFILTER": str(command), "PYTHON": sys.executable} | environment
    return subprocess.run(
        [str(SCRIPT), *arguments], env=os.environ | given, capture_output=True, text=True, timeout=500
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        ((), {}, "--model is missing"),
        (("--modle=a",), {}, "--modle=a: unknown"),
        (("--model=",), {}, "--model=: unknown"),
        (("--model=/no/such/model",), {}, "/no/such/model"),
        (("--model=smollm2",), {"GEMFILTER": "no-such-command"}, "no-such-command is not installed"),
    ],
)
def test_mistakes_are_one_line(arguments, environment, words, tmp_path):
    done = reproduce(*arguments, f"--output={tmp_path / 'made'}", **environment)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "made").exists()


@pytest.mark.exhaustive
def test_a_tiny_model_gets_its_page_and_a_second_run_adds_nothing(tmp_path):
    model = gguf_files.write(tmp_path / "tiny.gguf", Folder.read(GOLDEN / "llama_gqa_tied"))
    made = tmp_path / "made"
    arguments = (
        *(f"--model={model}", f"--longbench={LONGBENCH}", f"--output={made}", "--lengths=150,300", "--bench=150"),
        *("--keep=96,128", "--layers=1,2", "--count=1", "--", "--dtype=float32"),
    )
    done = reproduce(*arguments, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(made / "index.md")
    page = (made / "index.md").read_text()
    for heading in ("Needle in a haystack", "LongBench, without chat template", "LongBench by filter layer"):
        assert heading in page
    assert "Weights in float32; filter layer " in page
    assert page.count("| paper | 96 |") == 2 + 1 + 1 + 5
    assert re.findall(r"^\| (\d) \| 4 \| 4 \| 0 \| 0\.\d{3} \|$", page, re.MULTILINE) == ["1", "2"]
    assert re.search(r"snapkv +│ +172 │ +96 ", page)
    for plot in ("needles.png", "longbench.png", "bench.png"):
        assert (made / plot).read_bytes().startswith(b"\x89PNG")
        assert plot in page
    assert (made / "needles.jsonl").read_bytes().count(b"\n") == 1 + (8 + 10) * 4  # 8 places are left in 150 tokens
    before = {path.name: path.read_bytes() for path in made.glob("*.json*")}
    shutil.rmtree(tmp_path / "cache")
    assert reproduce(*arguments).returncode == 0
    assert {path.name: path.read_bytes() for path in made.glob("*.json*")} == before
    assert (made / "index.md").read_text() == page
    others = [one.replace("--bench=150", "--bench=200") for one in arguments]
    done = reproduce(*others)
    assert done.returncode == 2
    assert "bench.json is of --model=" in done.stderr
    assert (made / "index.md").read_text() == page
