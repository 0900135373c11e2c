"""Many requests in one run: what becomes of each line, whatever is around it, and of a run that is cut off."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import gguf_files
import jax
import numpy as np
import pytest
from model_files import GOLDEN, Folder

from gemfilter_jax import files, pipeline
from gemfilter_jax.errors import UserError
from gemfilter_jax.generate.sampling import GREEDY, Sampling
from gemfilter_jax.parallel import processes
from gemfilter_jax.serving import requests_file

# Batches hold 4 requests or 1, and prompts are about as long, so that few programs are compiled.
_WARM = Sampling(temperature=1.5)
_NEW_TOKENS = 12


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return gguf_files.write(tmp_path_factory.mktemp("model") / "tiny.gguf", Folder.read(GOLDEN / "llama_gqa_tied"))


@pytest.fixture(scope="module")
def model(model_file):
    return pipeline.load(str(model_file), dtype="float32")


def _text(seed: int) -> str:
    """65 to 96 tokens with any short question."""
    return " ".join(np.random.default_rng(seed).choice(["ab", "a", "b", "12", "1", "2", "<tool>"], 38))


def _write(path: pathlib.Path, *lines: dict | bytes) -> pathlib.Path:
    """A requests file; what is bytes becomes a line as it is."""
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


def _good(count: int) -> list[dict]:
    return [{"prompt": _text(seed), "question": "12 ab", "id": f"no. {seed}"} for seed in range(count)]


def _run(model, asked: pathlib.Path, output: pathlib.Path, *, batch=4, sampling=GREEDY, seed=0, **settings) -> list:
    method = model.method(keep=48, filter_layer=1)
    settings = {"method": method, "max_new_tokens": _NEW_TOKENS} | settings
    with files.growing(output) as file:
        begun = requests_file.resume(asked, file)
        requests_file.answer(model, begun, batch=batch, sampling=sampling, seed=seed, **settings)
    return _lines(output)


def _finished(asked: pathlib.Path, output: pathlib.Path) -> int:
    with files.growing(output) as file:
        return requests_file.resume(asked, file).finished


def _lines(output: pathlib.Path) -> list[dict]:
    """The lines of an output but for what no two runs have in common."""
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    for line in lines:
        line.pop("timings", None)
    return lines


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """A requests file and the output of a whole run."""
    folder = tmp_path_factory.mktemp("finished")
    asked = _write(folder / "requests.jsonl", *_good(9))
    output = folder / "answers.jsonl"
    _run(model, asked, output)
    return asked, output


def test_a_line_is_what_the_library_answers(model, finished):
    _, output = finished
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 9
    for number, (line, request) in enumerate(zip(lines, _good(9), strict=True), 1):
        method = model.method(keep=48, filter_layer=1)
        alone = model.generate(request["prompt"], request["question"], method=method, max_new_tokens=_NEW_TOKENS)
        timings, of = line.pop("timings"), line.pop("of")
        assert set(timings) <= {"tokenize", "filter", "prefill", "decode", "compile"}
        assert len(of) == 16
        assert line == {
            "request": number,
            "id": request["id"],
            "prompt_tokens": alone.selection.prompt_tokens,
            "kept_tokens": 48,
            "indices": list(alone.selection.indices),
            "spans": [list(span) for span in alone.selection.spans],
            "recall_estimate": alone.selection.recall_estimate,
            "text": alone.text,
            "stop_reason": alone.stop_reason,
        }
    assert len({line["text"] for line in lines}) > 5


def test_draws_depend_on_the_line_and_not_on_the_batch(model, tmp_path):
    asked = _write(tmp_path / "requests.jsonl", *[{"prompt": _text(0)}] * 3, b"", *_good(6))
    alone, together = (
        _run(model, asked, tmp_path / str(batch), batch=batch, sampling=_WARM, seed=7) for batch in (1, 4)
    )
    assert alone == together
    texts = [line.get("text") for line in alone]
    assert len(set(texts)) == len(texts) == 9
    method = model.method(keep=48, filter_layer=1)
    third = model.generate(_text(0), method=method, max_new_tokens=_NEW_TOKENS, sampling=_WARM, seed=7 + 2)
    assert texts[2] == third.text


def test_a_batch_takes_a_seed_for_each_row(model):
    texts, method = [_text(0)] * 4, model.method(keep=48, filter_layer=1)

    def drawn(seed):
        results = model.generate_batch(texts, method=method, max_new_tokens=_NEW_TOKENS, sampling=_WARM, seed=seed)
        return [result.text for result in results]

    assert drawn([2**32 - 1, 6, 4, 5]) == [drawn(2**32 - 1)[0], *np.array(drawn(4))[[2, 0, 1]]]
    with pytest.raises(UserError, match="4 texts but 2 seeds"):
        drawn([1, 2])


_BAD = [
    (b"{prompt: 1}", "not JSON"),
    (b'{"prompt": "ab"', "not JSON"),
    (b'{"prompt": "ab"} {"prompt": "ab"}', "not JSON"),
    (b'{"id": %s}' % (b"1" * 5000), "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"prompt": "ab \xff"}', "not UTF-8 (byte 0xff"),
    (b'["ab"]', "not an object"),
    (b'{"prompt": "ab \\ud800"}', "prompt has half of a surrogate pair at character 3"),
    (b'{"prompt": "ab", "id": "\\ud800"}', "id has half of a surrogate pair at character 0"),
    ({}, "either prompt or prompt_file"),
    ({"question": "12"}, "either prompt or prompt_file"),
    ({"prompt": "ab", "prompt_file": "book.txt"}, "either prompt or prompt_file"),
    ({"prompt": "ab", "prompts": "ab"}, "field 'prompts' is unknown; one of prompt, prompt_file, question, id"),
    ({"prompt": ["ab"]}, "prompt is not a string"),
    ({"prompt_file": 3}, "prompt_file is not a string"),
    ({"prompt": None}, "either prompt or prompt_file"),
    ({"prompt": "ab", "id": True}, "id is not a string or a number"),
    ({"prompt": "ab", "id": ["x"]}, "id is not a string or a number"),
    (b'{"prompt": "ab", "id": 1e999}', "id is inf"),
    ({"prompt_file": "no.txt"}, "prompt_file 'no.txt': cannot be read (No such file or directory)"),
    ({"prompt_file": "."}, "prompt_file '.': found a folder, expected a plain file"),
    ({"prompt_file": "a\0b"}, "cannot be read"),
    ({"prompt_file": "fifo"}, "expected a plain file"),
    ({"prompt_file": "zero"}, "lies outside the folder of the requests; --outside_files allows that"),
    ({"prompt_file": "../book.txt"}, "lies outside the folder"),
    ({"prompt_file": "/dev/zero"}, "lies outside the folder"),
    ({"prompt_file": "loop"}, "cannot be read"),
    ({"prompt_file": "large.txt"}, "expected at most 268,435,456"),
    ({"prompt_file": "latin1.txt"}, "prompt_file 'latin1.txt': not UTF-8 (byte 0xe9 at offset 1)"),
    ({"prompt": " \n"}, "prompt is empty"),
    ({"prompt": "ab", "question": " "}, "question is empty"),
    ({"prompt": _text(0), "question": "ab " * 60}, "keep more than that"),
]


@pytest.fixture(scope="module")
def mixed(model, tmp_path_factory):
    """Every kind of bad request, a good one before each."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "book.txt").write_text(_text(5))
    (folder / "latin1.txt").write_bytes(b"a\xe9")
    os.mkfifo(folder / "fifo")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "loop").symlink_to("loop")
    with (folder / "large.txt").open("wb") as sparse:
        sparse.truncate(1 << 40)
    good = {"prompt_file": "book.txt", "question": "12 ab"}
    asked = _write(folder / "requests.jsonl", *[line for bad, _ in _BAD for line in (good, bad)])
    return _run(model, asked, folder / "answers.jsonl")


@pytest.mark.parametrize("index", range(len(_BAD)), ids=[said for _, said in _BAD])
def test_a_bad_request_fails_alone(mixed, index):
    good, bad = mixed[2 * index : 2 * index + 2]
    assert [good["request"], bad["request"]] == [2 * index + 1, 2 * index + 2]
    assert set(bad) == {"request", "of", "error"}
    assert _BAD[index][1] in bad["error"]
    assert len(bad["error"].splitlines()) == 1
    assert good["kept_tokens"] == 48
    assert good["text"] == mixed[0]["text"] != ""


@pytest.mark.parametrize("name", [17, -0.5, "é世", "", 10**30])
def test_an_id_comes_back_as_it_was(model, tmp_path, name):
    asked = _write(tmp_path / "requests.jsonl", {"unknown": 1, "id": name}, {"prompt": "", "id": name})
    assert [line["id"] for line in _run(model, asked, tmp_path / "answers.jsonl")] == [name, name]


def test_a_byte_order_mark_blank_lines_and_null_are_no_mistakes(model, tmp_path):
    asked = tmp_path / "requests.jsonl"
    first, second = (json.dumps({"prompt": _text(seed), "question": None, "id": None}) for seed in (0, 1))
    asked.write_bytes(f"\ufeff{first}\r\n\n \t\n{second}".encode())
    lines = _run(model, asked, tmp_path / "answers.jsonl")
    assert [line["request"] for line in lines] == [1, 4]
    assert all("id" not in line and line["text"] for line in lines)
    assert _finished(asked, tmp_path / "answers.jsonl") == 2


def test_files_outside_the_folder_are_read_on_request(model, tmp_path):
    (tmp_path / "book.txt").write_text(_text(0))
    (tmp_path / "requests").mkdir()
    lines = [{"prompt_file": "../book.txt"}, {"prompt_file": str(tmp_path / "book.txt")}, {"prompt_file": "/dev/zero"}]
    asked = _write(tmp_path / "requests" / "requests.jsonl", *lines)
    texts = [line.get("text") for line in _run(model, asked, tmp_path / "answers.jsonl", outside=True)]
    assert texts[0] == texts[1] != ""
    assert texts[2] is None


def test_memory_that_one_request_is_too_large_for_fails_that_one(model, tmp_path, monkeypatch):
    answer = type(model).generate_batch

    def limited(self, texts, *args, **options):
        if any("large" in text for text in texts):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory allocating 1 byte")
        return answer(self, texts, *args, **options)

    monkeypatch.setattr(type(model), "generate_batch", limited)
    asked = _write(tmp_path / "requests.jsonl", {"prompt": _text(0)}, {"prompt": "large"}, {"prompt": _text(1)})
    lines = _run(model, asked, tmp_path / "answers.jsonl")
    assert [line.get("error") for line in lines] == [None, "memory is too small for this request", None]


def test_prompts_are_read_when_their_batch_comes(model, tmp_path):
    asked = _write(tmp_path / "requests.jsonl", *[{"prompt_file": f"{number}.txt"} for number in range(4)])
    (tmp_path / "0.txt").write_text(_text(0))

    def progress(finished: int, total: int) -> None:
        assert total == 4
        (tmp_path / f"{finished + 1}.txt").write_text(_text(finished + 1))

    assert all("text" in line for line in _run(model, asked, tmp_path / "answers.jsonl", batch=1, progress=progress))


def _cuts(data: bytes) -> list[int]:
    """Where an output may end: at an end of a line, and early, in the middle and late in the next."""
    ends = [0, *(index + 1 for index, byte in enumerate(data) if byte == ord("\n"))]
    return [cut for k in (0, 1, 4, 5, 8) for cut in (ends[k], ends[k] + 1, ends[k] + 60, ends[k + 1] - 1)]


def test_a_run_that_was_cut_anywhere_is_taken_up(model, finished, tmp_path):
    asked, output = finished
    whole = output.read_bytes()
    for cut in _cuts(whole):
        again = tmp_path / f"{cut}.jsonl"
        again.write_bytes(whole[:cut])
        kept = whole[:cut].rpartition(b"\n")
        assert _finished(asked, again) == kept[0].count(b"\n") + len(kept[1])
        assert again.read_bytes() == kept[0] + kept[1]
        assert _run(model, asked, again) == _lines(output)
        assert again.read_bytes().startswith(kept[0] + kept[1])


def test_requests_may_be_added(model, finished, tmp_path):
    """To a file whose last line did not end, too."""
    asked, output = finished
    more = tmp_path / "requests.jsonl"
    more.write_bytes(asked.read_bytes() + json.dumps(_good(11)[9]).encode())
    again = tmp_path / "answers.jsonl"
    again.write_bytes(output.read_bytes())
    assert [line["request"] for line in _run(model, more, again)] == list(range(1, 11))
    more.write_bytes(more.read_bytes() + b"\n" + json.dumps(_good(11)[10]).encode())
    assert [line["request"] for line in _run(model, more, again)] == list(range(1, 12))
    assert again.read_bytes().startswith(output.read_bytes())


def _changed(lines: list[bytes], number: int, line: bytes) -> bytes:
    return b"".join([*lines[: number - 1], line, *lines[number:]])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda asked, told: (_changed(asked, 4, b'{"prompt": "other"}\n'), told), "line 4 does not answer line 4"),
        (lambda asked, told: (b"".join(asked[1:]), told), "line 1 does not answer line 1"),
        (lambda asked, told: (b"".join(asked[:-1]), told), "line 9 answers nothing"),
        (lambda asked, told: (b"".join(asked[:-1]), told[:-5]), "line 9 answers nothing"),
        (lambda asked, told: (b"".join(asked[:5]), told), "line 6 answers nothing"),
        (lambda asked, told: (b"".join(asked), told + b"\n"), "line 10 answers nothing"),
        (lambda asked, told: (b"".join(asked), b"my notes\n"), "line 1 does not answer"),
        (lambda asked, told: (b"".join(asked), b"my notes"), "line 1 does not answer"),
        (lambda asked, told: (b"".join(asked), b"{\n"), "line 1 does not answer"),
        (lambda asked, told: (b"".join(asked), b"\n" + told), "line 1 does not answer"),
        (lambda asked, told: (b"".join(asked), b"".join(asked)), "line 1 does not answer"),
        (lambda asked, told: (b"".join(asked), told.split(b"\n", 1)[0] + b"\nmy notes"), "line 2 does not answer"),
        (lambda asked, told: (b"", told), "line 1 answers nothing"),
        (lambda asked, told: (b"", b""), "is empty"),
    ],
)
def test_an_output_of_other_requests_is_refused_and_left_alone(finished, tmp_path, change, said):
    asked, output = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    requested, told = change(finished[0].read_bytes().splitlines(keepends=True), finished[1].read_bytes())
    asked.write_bytes(requested)
    output.write_bytes(told)
    with pytest.raises(UserError, match=said) as refused:
        _finished(asked, output)
    assert str(asked) in str(refused.value)
    assert said == "is empty" or str(output) in str(refused.value)
    assert (output.read_bytes() if output.exists() else b"") == told


def test_requests_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"no\.jsonl: cannot be read"):
        _finished(tmp_path / "no.jsonl", tmp_path / "answers.jsonl")
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, pathlib.Path("/dev/zero")):
        with pytest.raises(UserError, match="expected a plain file"):
            _finished(path, tmp_path / "answers.jsonl")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"filter_layer": 3}, "filter layer 3 is out of range"),
        ({"max_new_tokens": 512}, "max_new_tokens is 512, but the model's context is 512"),
        ({"message_format": "{text}"}, "must hold"),
    ],
)
def test_settings_that_serve_no_request_fail_no_request(model, tmp_path, settings, said):
    asked, output = _write(tmp_path / "requests.jsonl", *_good(2)), tmp_path / "answers.jsonl"
    method = model.method(keep=48, filter_layer=settings.get("filter_layer", 1))
    model = pipeline.Pipeline(
        model.checkpoint, model.preset, message_format=settings.get("message_format", model.message_format)
    )
    with pytest.raises(UserError, match=said):
        _run(model, asked, output, method=method, max_new_tokens=settings.get("max_new_tokens", _NEW_TOKENS))
    assert not output.exists()


def test_only_the_first_of_several_processes_writes(model, tmp_path, monkeypatch):
    asked, output = _write(tmp_path / "requests.jsonl", *_good(1)), tmp_path / "answers.jsonl"
    monkeypatch.setattr(processes, "is_first", lambda: False)
    with pytest.raises(FileNotFoundError):  # by the test, which reads it
        _run(model, asked, output)


def test_a_full_disk_ends_the_run_and_what_is_there_is_kept(model, finished, tmp_path, monkeypatch):
    asked, output = finished[0], tmp_path / "answers.jsonl"
    synced = []

    def fsync(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match=r"cannot be written \(No space left"):
            _run(model, asked, output)
    kept = output.read_bytes()
    assert kept.count(b"\n") >= 4
    assert _run(model, asked, output) == _lines(finished[1])
    assert output.read_bytes().startswith(kept)


def _mixed_requests(folder: pathlib.Path) -> pathlib.Path:
    """50 requests, every fifth of them bad."""
    (folder / "book.txt").write_text(_text(3))
    lines: list[dict | bytes] = []
    bad = [b"[]", b"not JSON", {"prompt": 1}, {"prompt_file": "no.txt", "id": 4}, {"text": "ab"}]
    for number in range(1, 51):
        if number % 5 == 3:
            lines.append(bad[number // 5 % len(bad)])
        elif number % 3:
            lines.append({"prompt": _text(number), "id": number})
        else:
            lines.append({"prompt_file": "book.txt", "question": f"{number} ab"})
    return _write(folder / "requests.jsonl", *lines)


def _command(asked: pathlib.Path, output: pathlib.Path, model_file: object, *flags: str) -> list[str]:
    command = [sys.executable, "-m", "gemfilter_jax.cli.main", "generate", f"--prompts={asked}", f"--output={output}"]
    return [*command, f"--model={model_file}", *flags]


def test_fifty_requests_survive_a_kill(model, model_file, tmp_path):
    asked, output, uncut = _mixed_requests(tmp_path), tmp_path / "answers.jsonl", tmp_path / "uncut.jsonl"
    flags = ("--keep=48", "--filter_layer=1", f"--max_new_tokens={_NEW_TOKENS}", "--batch=4", "--temperature=1.5")
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    killed = subprocess.Popen(_command(asked, output, model_file, *flags), env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not output.exists() or not output.read_bytes().count(b"\n"):
            assert killed.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        killed.kill()
    assert killed.wait() == -signal.SIGKILL
    kept = output.read_bytes()
    whole = kept.count(b"\n")
    assert 0 < whole < 50
    output.write_bytes(kept[:-20])  # the last line half written
    again = subprocess.run(
        _command(asked, output, model_file, *flags),
        env=environment, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert again.stdout == ""
    assert again.stderr.splitlines()[-1].endswith(f"already there {kept[:-20].count(10)}")
    assert output.read_bytes().startswith(kept[: kept.rindex(b"\n", 0, -1) + 1])
    lines = _lines(output)
    assert [line["request"] for line in lines] == list(range(1, 51))
    assert lines == _run(model, asked, uncut, sampling=_WARM)
    assert len({line["text"] for line in lines if "text" in line}) > 30


def test_a_finished_run_loads_no_model(finished):
    asked, output = finished
    before = output.read_bytes()
    done = subprocess.run(
        _command(asked, output, "missing.gguf"), capture_output=True, text=True, check=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("", "answered 0, failed 0, already there 9\n")
    assert output.read_bytes() == before
