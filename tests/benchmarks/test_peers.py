"""benchmarks/peers: its protocol, its rounds and its page, and what is written there in PyTorch."""

import copy
import functools
import itertools
import json
import pathlib
import subprocess
import sys
import types

import gguf
import gguf_files
import jax
import numpy as np
import pytest
import tiny
from model_files import FLOAT32, GOLDEN

from gemfilter_jax.checkpoints.gguf_file import GGUFFile
from gemfilter_jax.checkpoints.hf_folder import HuggingFaceFolder
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.timing import Stopwatch

PEERS = pathlib.Path(__file__).parents[2] / "benchmarks" / "peers"
FAKE = """
import os, pathlib, time

class Runs:
    def load(self, **given):
        return {"versions": given}

    def run(self, *, method, ids=None, of="run"):
        print("libraries may print")
        with open(os.environ["FAKE_LOG"], "a") as log:
            print(of, method, ids, file=log)
        if method == "fails" and of == "run":
            raise RuntimeError("no memory\\nfor this")
        if method == "ends":
            os._exit(3)
        time.sleep(0.05)
        return {"seconds": {"total": 1.0}, "tokens": [7], "held": 2, "kept": [0, 2]}

    def warm_up(self, **given):
        return self.run(**given, of="warm_up")
"""


@pytest.fixture
def modules(monkeypatch):
    """compare.py and what it imports, which are scripts beside each other."""
    monkeypatch.syspath_prepend(str(PEERS))
    import compare
    import page
    import protocol

    return compare, page, protocol


@pytest.fixture
def fake(tmp_path, monkeypatch, modules):
    """Starts workers that measure nothing, and the file in which they note what they are asked."""
    (tmp_path / "fake_worker.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    started = []

    def start(module="fake_worker"):
        started.append(modules[2].Worker([sys.executable, str(PEERS / "protocol.py"), module]))
        return started[-1]

    yield start, tmp_path / "log"
    for worker in started:
        worker.close()


def test_programs_take_turns_and_one_that_fails_does_not_stop_the_others(modules, fake):
    compare, _, _ = modules
    start, log = fake

    def peer(worker, action, of_kept=False):
        return compare.Peer(worker, "method", "float32", worker, action, of_kept)

    peers = [
        peer("gemfilter_jax", "first"),
        peer("other", "fails"),
        peer("third", "ends"),
        peer("missing", "x"),
        peer("other", "last", of_kept=True),
    ]
    workers = {name: start() for name in ("gemfilter_jax", "other", "third")}
    found = compare.measure(peers, workers, {"missing": "not here"}, [5, 6, 8], rounds=2)
    assert log.read_text().splitlines() == [
        "warm_up first None",
        "warm_up fails [5, 6, 8]",
        "warm_up ends [5, 6, 8]",
        "warm_up last [5, 8]",
        "run first None",
        "run fails [5, 6, 8]",
        "run last [5, 8]",
        "run first None",
        "run last [5, 8]",
    ]
    assert [record.get("not_measured") for record in found] == [
        None,
        "RuntimeError: no memory",
        "the process has ended with status 3",
        "not here",
        None,
    ]
    assert [len(record.get("runs", [])) for record in found] == [2, 0, 0, 0, 2]
    assert [found[index]["prompt_tokens"] for index in (0, 4)] == [3, 2]
    assert all(run["seconds"] == {"total": 1.0} and 0 <= run["others"] <= 1 for run in found[0]["runs"])


def test_this_project_must_not_fail(modules, fake):
    compare, _, protocol = modules
    peers = [compare.Peer("gemfilter_jax", "paper", "float32", "gemfilter_jax", "ends")]
    with pytest.raises(protocol.WorkerError, match="status 3"):
        compare.measure(peers, {"gemfilter_jax": fake[0]()}, {}, [5], rounds=1)


def test_a_library_or_an_interpreter_that_is_missing_is_named(modules, fake):
    with pytest.raises(modules[2].WorkerError, match="No module named 'no_such_worker'"):
        fake[0]("no_such_worker").ask("load")
    with pytest.raises(modules[2].WorkerError, match=r"/no/python: No such file"):
        modules[2].Worker(["/no/python"])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["RESULT.json", "--tokens=many"], "--tokens: 'many' was given, expected a number of at least 1"),
        (["RESULT.json", "--threads=100000"], "--threads: '100000' was given, expected a number from 1 to"),
        (["RESULT.json", "--keep=0"], "--keep: '0' was given, expected a number of at least 64"),
        (["/no/folder/RESULT.json"], "folder /no/folder does not exist"),
        (["RESULT.md"], "is the page's name"),
        ([], "required: output"),
    ],
)
def test_wrong_flags_are_told_before_any_work(modules, monkeypatch, capsys, tmp_path, flags, told):
    compare = modules[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare.py", *flags])
    monkeypatch.setattr(compare, "_compare", lambda _: pytest.fail("work was begun"))
    with pytest.raises(SystemExit) as ended:
        compare._main()
    assert ended.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_in_a_line(modules, monkeypatch, capsys, tmp_path):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "RESULT.json")])
    monkeypatch.setattr(modules[0], "_compare", full)
    with pytest.raises(SystemExit) as ended:
        modules[0]._main()
    assert ended.value.code == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]


def test_seconds_of_this_project_have_no_compilation(modules, monkeypatch):
    import own_worker

    clock = itertools.count(10.0, 10.0)
    monkeypatch.setattr(own_worker, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    kept = types.SimpleNamespace(indices=(0, 2))
    seconds = {"tokenize": 1.0, "prefill": 2.0, "decode": 3.0, "compile": 4.0}
    result = types.SimpleNamespace(timings=seconds, tokens=(7, 8), selection=kept)
    runs = own_worker.Runs()
    runs._case, runs._new_tokens = types.SimpleNamespace(text="a", question="b"), 2
    runs._model = types.SimpleNamespace(
        method=lambda name: types.SimpleNamespace(fields={"name": name}), generate=lambda *_, **__: result
    )
    answer = runs.run(method="full")
    assert answer["seconds"] == {"tokenize": 1.0, "prefill": 2.0, "decode": 3.0, "total": 10.0 - 4.0}
    assert (answer["tokens"], answer["held"], answer["settings"]) == ((7, 8), 2, {"name": "full"})


def _peer(program, method, weights, decode, bits=32, **fields):
    runs = [
        {"seconds": {"prefill": 1.0, "decode": seconds, "total": 1.0 + seconds}, "others": 0.01 * number}
        for number, seconds in enumerate(decode)
    ]
    names = {"program": program, "method": method, "weights": weights}
    record = {"runs": runs, "bits": bits, "answer": "it is|`so`\n", "prompt_tokens": 900, "held": 900}
    return names | record | fields


RESULT = {
    "versions": {"jax": "1.2", "torch": "3.4"},
    "processor": "a processor",
    "model": "a.gguf",
    "prompt_tokens": 900,
    "layer": 18,
    "new_tokens": 9,
    "keep": 64,
    "threads": 2,
    "rounds": 3,
    "peers": [
        _peer("gemfilter_jax", "paper", "float32", [1.0, 9.0, 2.0], held=64),
        _peer("gemfilter_jax", "default rule", "float32", [3.0, 3.0, 3.0], held=64),
        _peer("gemfilter_jax", "default rule", "int8", [2.0, 2.0, 2.0], 13.2, held=64),
        _peer("PyTorch", "paper", "float32", [8.0, 5.0, 4.0], held=64, kept_as_here=63),
        {"program": "PyTorch", "method": "SnapKV", "weights": "float32", "not_measured": "no module torch"},
        _peer(
            "llama.cpp",
            "kept tokens",
            "Q4_1",
            [0.5, 1.0, 0.25],
            5.7449,
            prompt_tokens=64,
            held=64,
            settings={"batchSize": 512},
            tried=[{"batchSize": 512, "seconds": {"total": 1.5}}, {"batchSize": 2048, "seconds": {"total": 2.5}}],
        ),
    ],
}


def _rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_the_page_has_medians_all_runs_and_ratios_of_medians(modules):
    text = modules[1].markdown(RESULT)
    rows = _rows(text.split("## Seconds")[1].split("## ")[0])
    own = ["-", "**1.00** (1.00, 1.00, 1.00)", "**2.00** (1.00, 9.00, 2.00)", "**3.00** (2.00, 10.00, 3.00)"]
    assert rows[2] == ["gemfilter_jax", "paper", "float32", *own, "0.75", "1.00", "2%"]
    assert rows[4][2:4] + rows[4][6:9] == ["int8", "-", "**3.00** (3.00, 3.00, 3.00)", "0.75", "0.75"]
    assert rows[5][:3] + rows[5][6:] == [
        "PyTorch",
        "paper",
        "float32",
        "**6.00** (9.00, 6.00, 5.00)",
        "1.50",
        "2.00",
        "2%",
    ]
    assert len(rows) == 6  # a program that read the kept tokens alone took less work, and has no place here


def test_the_page_has_decoding_speeds_checks_and_what_is_missing(modules):
    text = modules[1].markdown(RESULT)
    rows = _rows(text.split("## Decoding")[1].split("## ")[0])
    assert rows[2][3:] == ["64", "**4.00** (8.00, 0.89, 4.00)"]
    assert rows[-1] == ["llama.cpp", "kept tokens", "Q4_1, 5.74 bits", "64", "**16.00** (16.00, 8.00, 32.00)"]
    assert "PyTorch, float32, keeps by the paper's algorithm 63 of the 64 tokens" in text
    assert "| `it is 'so'` |" in text
    assert "- PyTorch, SnapKV, float32: no module torch" in text
    settings = text.split("## Settings")[1]
    assert "llama.cpp, kept tokens: batchSize 512." in settings
    assert _rows(settings)[2:] == [["512", "1.50"], ["2048", "2.50"]]


def test_the_page_stands_without_other_programs_and_of_one_round(modules):
    result = copy.deepcopy(RESULT) | {"rounds": 1}
    del result["peers"][2:]
    for peer in result["peers"]:
        del peer["runs"][1:]
    text = modules[1].markdown(result)
    assert "Not measured" not in text
    assert "| **1.00** | **1.00** | **2.00** | 0.50 | 1.00 | 0% |" in text


def test_page_script_prints_the_page(tmp_path):
    file = tmp_path / "RESULT.json"
    file.write_text(json.dumps(RESULT))
    ran = subprocess.run([sys.executable, PEERS / "page.py", file], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("# This project beside others")


@pytest.mark.parametrize(
    ("content", "told"), [(None, "cannot be read"), ("{", "is not a result"), ('{"rows": []}', "is not a result")]
)
def test_page_script_tells_in_a_line_what_is_no_result(modules, tmp_path, monkeypatch, capsys, content, told):
    file = tmp_path / "RESULT.json"
    if content is not None:
        file.write_text(content)
    monkeypatch.setattr(sys, "argv", ["page.py", str(file)])
    with pytest.raises(SystemExit) as ended:
        modules[1]._main()
    assert ended.value.code == 2
    assert f"{file} {told}" in capsys.readouterr().err.splitlines()[-1]


def test_committed_pages_are_of_the_committed_results(modules):
    results = list(PEERS.glob("*.json"))
    assert results
    for result in results:
        assert result.with_suffix(".md").read_text() == modules[1].markdown(json.loads(result.read_text()))


@pytest.mark.parametrize(("kind", "bits", "step"), [("F32", 32.0, 0), ("F16", 16.0, 2**-11), ("Q8_0", 8.5, 1 / 127)])
def test_weights_of_other_bits_are_those_of_the_file(modules, tmp_path, kind, bits, step):
    import gguf_weights

    source = gguf_files.write(tmp_path / "model.gguf", gguf_files.wide("llama"), gguf_files.Kind.Q8_0)
    gguf_weights.convert(source, tmp_path / "other.gguf", kind)
    read = gguf.GGUFReader(tmp_path / "other.gguf")
    assert {one.tensor_type.name for one in read.tensors if len(one.shape) > 1} == {kind}
    vectors = sum(int(one.n_elements) for one in read.tensors if len(one.shape) == 1)  # in 32 bits
    elements = sum(int(one.n_elements) for one in read.tensors)
    assert gguf_weights.bits(tmp_path / "other.gguf") == pytest.approx(bits + (32 - bits) * vectors / elements)
    then, now = (jax.tree.leaves(GGUFFile(path).decoder(FLOAT32)) for path in (source, tmp_path / "other.gguf"))
    assert all(np.abs(a - b).max() <= step * np.abs(a).max() for a, b in zip(then, now, strict=True))


@pytest.fixture(scope="module")
def torch_peers():
    """torch_worker.py, where PyTorch is, and a tiny model there."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sys.path.insert(0, str(PEERS))
    import torch_worker

    sys.path.remove(str(PEERS))
    model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / "llama_gqa_tied", dtype=torch.float32).eval()
    with torch.no_grad():
        yield torch_worker, model


def test_pytorch_picks_what_the_published_code_does(torch_peers):
    import torch

    stored = np.load(GOLDEN / "official_selection.npz")
    names = [name.removesuffix("_topk") for name in stored.files if name.endswith("_topk")]
    assert names
    for name in names:
        q, k = (torch.tensor(stored[f"{name}_{part}"]) for part in ("q_last", "k"))
        kept = torch_peers[0].select(q, k, int(stored[f"{name}_topk"]))
        assert kept.tolist() == stored[f"{name}_indices"].tolist()


def test_pytorch_filters_as_this_project_does(torch_peers):
    worker, model = torch_peers
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 150).astype(np.int32)
    decoder = HuggingFaceFolder(GOLDEN / "llama_gqa_tied").decoder(FLOAT32)
    for layer in range(model.config.num_hidden_layers):
        method = GemFilter.paper(layer, keep=40)
        (own,) = method.select(decoder, [tiny.prompt_of(ids, prefix=3, suffix=5)], watch=Stopwatch())
        assert worker.filtered(model, ids.tolist(), layer, 40).tolist() == own.indices.tolist()


@pytest.mark.parametrize("method", ["full", "snapkv"])
def test_pytorch_answers_as_the_reference_does(torch_peers, method):
    worker, model = torch_peers
    stored = np.load(GOLDEN / "compressed.npz")
    evict = functools.partial(worker.snapkv, keep=48, window=16) if method == "snapkv" else None
    for prompt in ("0", "1", "2"):  # far above what is kept, above it, below it
        ids = stored[f"llama_gqa_tied/ids/{prompt}"].tolist()
        expected = stored[f"llama_gqa_tied/{method}/{prompt}/greedy"].tolist()
        assert worker.generate(model, ids, len(expected), evict).tokens == expected
