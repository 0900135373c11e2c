"""The commands on the default model: what they print, and that JSON, stream, report and library agree."""

import html
import json
import re
import subprocess
import sys

import gguf_files
import pytest
from model_files import GOLDEN, Folder

from gemfilter_jax import pipeline
from gemfilter_jax.evals.tasks.needles import Needles

QUESTION = "What is the password of the old lighthouse?"
CASE_TOKENS = 600


@pytest.fixture(scope="module")
def book(smollm2, tmp_path_factory):
    case = next(Needles(depths=(0.4,)).examples(smollm2.checkpoint.tokenizer, CASE_TOKENS))
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(f"<b>&</b> é世界 {case.text}", encoding="utf-8")
    return path


def gemfilter(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "gemfilter_jax.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)


@pytest.fixture(scope="module")
def generated(book):
    report = book.with_suffix(".html")
    done = gemfilter(
        "generate", f"--prompt_file={book}", f"--question={QUESTION}", "--keep=200", "--max_new_tokens=16",
        "--format=json", f"--report={report}",
    )  # fmt: skip
    return json.loads(done.stdout), done.stderr, report


def test_generate_json_agrees_with_the_library(smollm2, book, generated):
    fields, stderr, _ = generated
    text = book.read_text(encoding="utf-8")
    result = smollm2.generate(text, QUESTION, method=smollm2.method(keep=200), max_new_tokens=16)
    assert fields["text"] == result.text
    assert "marigold" in fields["text"]
    assert fields["stop_reason"] == result.stop_reason
    assert fields["prompt_tokens"] == result.selection.prompt_tokens
    assert fields["kept_tokens"] == len(fields["indices"]) == 200
    assert fields["indices"] == list(result.selection.indices)
    assert [tuple(span) for span in fields["spans"]] == list(result.selection.spans)
    assert set(fields["timings"]) == {"tokenize", "filter", "prefill", "decode", "compile"}
    kept = "".join(text[start:end] for start, end in fields["spans"])
    assert "The password of the old lighthouse is marigold." in kept
    estimate = result.selection.recall_estimate
    assert fields["recall_estimate"] == pytest.approx(
        estimate, abs=0.01
    )  # programs of two processes may differ in bits
    assert 0.5 < estimate < 1
    layer = smollm2.preset.default.filter_layer
    told = rf"read \d+ tokens, kept 200 \(ratio 0\.\d{{4}}\), layer {layer} of 30 picked, recall about 0\.\d\d$"
    assert re.search(told, stderr, re.MULTILINE)
    assert "warning" not in stderr
    assert re.search(r"filter \d+\.\d\d s", stderr)


def test_streamed_text_is_the_same_answer(book, generated):
    done = gemfilter(
        "generate",
        f"--prompt_file={book}",
        f"--question={QUESTION}",
        "--keep=200",
        "--max_new_tokens=16",
        "--show_kept",
    )
    assert done.stdout == generated[0]["text"] + "\n"
    assert "is marigold." in done.stderr


OTHER = "What does the text say of walking?"


@pytest.fixture(scope="module")
def asked_twice(book, tmp_path_factory):
    """Two questions in one run, and the folder in which what was read of the text is kept."""
    cache = tmp_path_factory.mktemp("cache")
    done = gemfilter(
        "generate", f"--prompt_file={book}", f"--question={OTHER}", f"--question={QUESTION}", "--keep=200",
        "--max_new_tokens=16", "--format=json", f"--document_cache={cache}",
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()], cache


def test_several_questions_are_answered_as_if_asked_alone(asked_twice, generated):
    (first, second), _ = asked_twice
    assert [first["question"], second["question"]] == [OTHER, QUESTION]
    for name in ("text", "stop_reason", "indices", "spans", "prompt_tokens", "kept_tokens"):
        assert second[name] == generated[0][name]
    assert "read" in first["timings"]
    assert "read" not in second["timings"]


def test_chat_reads_the_text_once_and_not_at_all_from_its_cache(book, asked_twice):
    (first, second), cache = asked_twice
    command = [sys.executable, "-m", "gemfilter_jax.cli.main", "chat", f"--prompt_file={book}", "--keep=200",
               "--max_new_tokens=16", f"--document_cache={cache}"]  # fmt: skip
    asked = f"{QUESTION}\n{'why ' * 300}\n{OTHER}\n\nnever asked\n"
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == f"{second['text']}\n{first['text']}\n"
    assert "keep more than that" in done.stderr
    assert len(list(cache.iterdir())) == 1


def test_keep_auto_keeps_fewer_and_still_what_matters(book, generated):
    done = gemfilter("select", f"--prompt_file={book}", f"--question={QUESTION}", "--keep=auto", "--format=json")
    fields = json.loads(done.stdout)
    assert fields["kept_tokens"] < 400
    text = book.read_text(encoding="utf-8")
    kept = "".join(text[start:end] for start, end in fields["spans"])
    assert "The password of the old lighthouse is marigold." in kept


def test_report_holds_the_whole_prompt_escaped(book, generated):
    fields, _, report = generated
    page = report.read_text(encoding="utf-8")
    shown = re.search(r"<pre>(.*)</pre>", page, re.DOTALL)[1]
    text = book.read_text(encoding="utf-8")
    assert html.unescape(re.sub(r"</?mark[^>]*>", "", shown)) == text
    marked = [html.unescape(piece) for piece in re.findall(r"<mark[^>]*>(.*?)</mark>", shown, re.DOTALL)]
    assert marked == [text[start:end] for start, end in fields["spans"]]
    assert "<b>&</b>" not in page
    assert not list(report.parent.glob(f".{report.name}*"))


def test_select_prints_the_kept_text(smollm2, book):
    shared = ("select", f"--prompt_file={book}", f"--question={QUESTION}", "--rule=paper", "--keep=150")
    kept, _ = smollm2.select(book.read_text(encoding="utf-8"), QUESTION, method=smollm2.method("paper", keep=150))
    assert gemfilter(*shared).stdout == "\n".join(kept.passages) + "\n"


_TELLING_ITS_PEAK = """
import atexit
import pathlib
import re
import runpy
import sys

def tell():
    print(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1], file=sys.stderr)

atexit.register(tell)
runpy.run_module("gemfilter_jax.cli.main", run_name="__main__")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
def test_a_whole_context_is_filtered_within_two_gigabytes(smollm2, tmp_path):
    """The process tells its own peak: what a parent can ask for is no less than the parent's own."""
    book = tmp_path / "long.txt"
    example = next(Needles(depths=(0.5,)).examples(smollm2.checkpoint.tokenizer, 8_080))
    book.write_text(example.text, encoding="utf-8")
    command = [sys.executable, "-c", _TELLING_ITS_PEAK, "select", f"--prompt_file={book}", f"--question={QUESTION}"]
    done = subprocess.run([*command, "--format=json"], capture_output=True, text=True, check=True, timeout=300)
    assert 8_100 < json.loads(done.stdout)["prompt_tokens"] <= 8_192
    peak = int(done.stderr.splitlines()[-1]) * 1024
    assert 1e8 < peak < 2e9


def test_convert_writes_a_model_that_every_command_takes(tmp_path):
    source = gguf_files.write(tmp_path / "tiny.gguf", Folder.read(GOLDEN / "llama_gqa_tied"))
    folder = tmp_path / "converted"
    assert gemfilter("convert", f"--model={source}", f"--output={folder}").stdout == f"{folder}\n"
    text = "ab12 ab <tool> 2 1 ab12 " * 9
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(text, encoding="utf-8")
    shared = ("select", f"--prompt_file={prompt}", "--keep=40", "--filter_layer=1", "--format=json")
    fields = json.loads(gemfilter(*shared, f"--model={folder}").stdout)
    assert set(fields) == {
        "prompt_tokens", "kept_tokens", "indices", "spans", "recall_estimate", "passages", "text", "timings"
    }  # fmt: skip
    assert fields["passages"] == [text[start:end] for start, end in fields["spans"]]
    assert fields["text"] == "\n".join(fields["passages"])
    assert fields["kept_tokens"] == len(fields["indices"]) == 40
    original = pipeline.load(str(source))
    kept, _ = original.select(text, method=original.method(keep=40, filter_layer=1))
    assert fields["indices"] == list(kept.indices)
