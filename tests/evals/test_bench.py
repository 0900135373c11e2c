"""`gemfilter bench` on a tiny model: what a row and its file hold, how mistakes and cut runs end."""

import copy
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import types

import gguf_files
import jax
import jax.numpy as jnp
import pytest
import tiny
from model_files import GOLDEN, Folder
from refusals import refusal

from gemfilter_jax import files
from gemfilter_jax.buckets import bucket
from gemfilter_jax.calls import Call
from gemfilter_jax.checkpoints import RandomWeights
from gemfilter_jax.cli import bench as command
from gemfilter_jax.cli import options
from gemfilter_jax.errors import UserError
from gemfilter_jax.evals import bench
from gemfilter_jax.evals.runner import Contestant
from gemfilter_jax.generate import loop
from gemfilter_jax.pipeline import Pipeline
from gemfilter_jax.planning import ceilings
from gemfilter_jax.planning.ceilings import Ceilings
from gemfilter_jax.results import KeptText, Result

CONFIG = tiny.CONFIG
KEEP, NEW_TOKENS, BATCH, REPEATS = 80, 4, 2, 2
LENGTHS = 70, 74  # whose prompts are padded to as many tokens as KEEP, so that few programs are compiled
CEILINGS = Ceilings(1e9, 4e9, 1e10)
MATRICES = 2 * CONFIG.width * (CONFIG.heads + CONFIG.kv_heads) * CONFIG.head_width + 3 * CONFIG.width * CONFIG.mlp_width
LAYER, REACH = 2, 256 * 9 // 16  # the model's preset's; beyond it prompts are read in segments


ATTENTIONS = ("auto", "dense")  # auto is dense for short prompts


def contestants(model) -> list[Contestant]:
    made = [Contestant("full", "all", model.method("full"))]
    for attention in ATTENTIONS:
        own = model.method(keep=KEEP, filter_attention=attention, filter_precision="int8")
        made.append(Contestant("default", KEEP, own))
    return [*made, Contestant("bm25", KEEP, model.method("bm25", keep=KEEP))]


@pytest.fixture(scope="module")
def model():
    return tiny.pipeline(tiny.decoder())


def _measured(model, contestants, lengths, **changed):
    asked = {"batches": [BATCH], "new_tokens": NEW_TOKENS, "repeats": 1, "ceilings": CEILINGS} | changed
    return [row for some in bench.run(model, contestants, lengths, **asked) for row in some]


@pytest.fixture(scope="module")
def rows(model):
    return _measured(model, contestants(model), LENGTHS, repeats=REPEATS)


def test_rows_are_those_of_each_method_and_filter_attention(rows):
    names = [("full", None), *(("default", attention) for attention in ATTENTIONS), ("bm25", None)]
    assert [(row.method, row.filter_attention) for row in rows] == names * len(LENGTHS)
    assert {row.batch for row in rows} == {BATCH}
    shorter, longer = ({row.prompt_tokens for row in some} for some in (rows[: len(names)], rows[len(names) :]))
    assert len(shorter) == len(longer) == 1
    assert min(LENGTHS) < min(shorter) < min(longer) <= bucket(KEEP)
    assert {row.kept_tokens for row in rows if row.method != "full"} == {KEEP}


def test_each_length_is_measured_with_each_batch(model, monkeypatch):
    def told(model, contestants, example, batch, *others):
        return [(example.tokens, batch, *others)]

    monkeypatch.setattr(bench, "_rows", told)
    asked = (NEW_TOKENS, 1, CEILINGS)
    wanted = [(length, batch, *asked) for length in LENGTHS for batch in (1, 4)]
    assert _measured(model, contestants(model), LENGTHS, batches=(1, 4)) == wanted


def test_measures_of_each_run_and_over_the_runs(rows):
    for row in rows:
        assert len(row.runs) == REPEATS
        stages = {"tokenize", "prefill", "decode"} | ({"filter"} & {name.split("_")[0] for name in row.median})
        assert ("filter" in stages) == (row.method in ("default", "bm25"))
        for run in row.runs:
            seconds = {stage: run[f"{stage}_seconds"] for stage in stages}
            assert min(seconds.values()) > 0
            assert run["total_seconds"] == pytest.approx(sum(seconds.values()))
            assert run["first_token_seconds"] == pytest.approx(sum(seconds.values()) - seconds["decode"])
            assert run["decode_step_seconds"] == pytest.approx(seconds["decode"] / (NEW_TOKENS - 1))
            assert run["tokens_per_second"] == pytest.approx(row.batch * NEW_TOKENS / sum(seconds.values()))
        for name, median in row.median.items():
            values = [run[name] for run in row.runs]
            assert median == statistics.median(values)
            assert (row.least[name], row.most[name]) == (min(values), max(values))
    for full, *others in (rows[start : start + 4] for start in range(0, len(rows), 4)):
        for row in others:
            for own, of_full in zip(row.runs, full.runs, strict=True):
                assert own["full_to_this_ratio"] == of_full["total_seconds"] / own["total_seconds"]


def test_compilation_is_apart_and_the_peak_is_the_highest_of_the_runs(rows, model, monkeypatch):
    """Of runs whose seconds and peaks are known; no stop token ends one."""
    stopping = dataclasses.replace(model, checkpoint=dataclasses.replace(model.checkpoint, stop_tokens=(1,)))
    events, compiling, peaks = [], iter([100.0, 7.0, 0.0, 0.0]), iter([30, 50, 40])

    def answer(self, texts, questions, *, method, max_new_tokens):
        events.append((len(texts), max_new_tokens, self.checkpoint.stop_tokens))
        seconds = {"compile": next(compiling), "tokenize": 1.0, "prefill": 2.0, "decode": 3.0}
        return [Result("", (), "length", KeptText("", 3, (0, 1, 2), ()), seconds)] * len(texts)

    monkeypatch.setattr(Pipeline, "generate_batch", answer)
    monkeypatch.setattr(bench, "_reset_peak", lambda: events.append("reset"))
    monkeypatch.setattr(bench, "peak_memory", lambda: next(peaks))
    monkeypatch.setattr(bench, "_work", lambda _: rows[0].work)
    (row,) = _measured(stopping, contestants(model)[:1], LENGTHS[:1], repeats=3)
    a_run = (BATCH, NEW_TOKENS, ())
    assert events == [a_run, *["reset", a_run] * 3]
    assert (row.compile_seconds, row.peak_bytes) == (100, 50)
    assert [run["total_seconds"] for run in row.runs] == [6, 6, 6]
    assert row.median["first_token_seconds"] == 3
    assert row.median["tokens_per_second"] == BATCH * NEW_TOKENS / 6


def test_bytes_of_a_program_are_its_arguments_results_and_temporaries():
    x, small = jnp.ones((256, 256)), 4096  # the code, and what the compiler aligns
    whole = Call(jax.jit(lambda x, y: x @ y), (x, x), {})
    assert 3 * x.nbytes <= bench._program_bytes(whole) < 3 * x.nbytes + small
    in_place = Call(jax.jit(lambda x: x + 1, donate_argnums=0), (x,), {})
    assert x.nbytes <= bench._program_bytes(in_place) < x.nbytes + small


@pytest.mark.parametrize("largest", ["score_prompt", "prefill", "decode"])
def test_the_largest_program_may_be_any(model, monkeypatch, largest):
    monkeypatch.setattr(bench, "_program_bytes", lambda call: 9 if call.function.__name__ == largest else 1)
    (row,) = _measured(model, contestants(model)[1:2], LENGTHS[:1])
    assert row.work.largest_program_bytes == 9


def _row(rows, method, attention=None):
    return next(row for row in rows if (row.method, row.filter_attention) == (method, attention))


def test_matrix_products_of_the_filter_are_those_of_a_hand_count(rows):
    """Products of weights are in int8: all of the layers before the filter layer, keys and last queries there."""
    row, window = _row(rows, "default", "dense"), 32
    padded, head = bucket(row.prompt_tokens), CONFIG.width * CONFIG.head_width
    of_a_prompt = LAYER * MATRICES * padded + head * (CONFIG.kv_heads * padded + CONFIG.heads * window)
    assert row.work.filter_int8_flops == BATCH * 2 * of_a_prompt
    assert row.work.filter_int8_flops < row.work.filter_flops < 2 * row.work.filter_int8_flops
    assert _row(rows, "bm25").work.filter_flops == 0


@pytest.mark.exhaustive
def test_matrix_products_of_prompts_in_segments_are_counted(model):
    """Each segment is read with the question, and none is padded to twice its length."""
    (row,) = _measured(model, contestants(model)[1:2], [200])
    assert row.prompt_tokens > CONFIG.context * 9 / 16  # the reach
    of_a_token = 2 * LAYER * MATRICES
    tokens = BATCH * row.prompt_tokens
    assert tokens * of_a_token < row.work.filter_int8_flops < 3 * tokens * of_a_token


def test_matrix_products_of_prefills(rows):
    for row in (_row(rows, "full"), _row(rows, "default", "dense"), _row(rows, "bm25")):
        least = BATCH * 2 * (CONFIG.layers * MATRICES * bucket(row.kept_tokens) + CONFIG.width * CONFIG.vocab)
        assert least < row.work.prefill_flops < 2 * least
        assert row.work.prefill_int8_flops == 0


@pytest.mark.exhaustive
def test_work_of_methods_that_evict(rows, model):
    """FastKV's later layers read as many tokens as its scores say."""
    evicting = [Contestant(name, 40, model.method(name, keep=40)) for name in ("snapkv", "fastkv")]
    snapkv, fastkv = _measured(model, evicting, LENGTHS[:1])
    assert snapkv.work.prefill_flops > _row(rows, "full").work.prefill_flops
    assert (fastkv.work.prefill_flops, fastkv.shares["prefill"]) == (None, None)
    for row in (snapkv, fastkv):
        assert row.work.decode_step_bytes < _row(rows, "full").work.decode_step_bytes
        assert row.shares["filter"] is None


def test_a_decode_step_reads_the_weights_and_the_cache_as_allocated(rows):
    weights = 4 * (CONFIG.layers * (MATRICES + 2 * CONFIG.width) + CONFIG.width + CONFIG.vocab * CONFIG.width)
    row = _row(rows, "default", "dense")
    slots = bucket(KEEP) + bucket(NEW_TOKENS)
    cache = 2 * 4 * CONFIG.layers * BATCH * slots * CONFIG.kv_heads * CONFIG.head_width
    assert row.work.decode_step_bytes == weights + cache
    assert row.work.largest_program_bytes > weights + cache


def test_a_decode_step_reads_an_lm_head_in_place_of_the_embedding(monkeypatch):
    monkeypatch.setattr(bench, "_program_bytes", lambda _: 1)
    sizes = {"layers": 3, "final_norm": 5, "embedding": 700, "lm_head": 11}
    model = types.SimpleNamespace(**{name: jnp.zeros(size, jnp.int8) for name, size in sizes.items()})
    state = types.SimpleNamespace(cache=types.SimpleNamespace(keys=jnp.zeros(13), values=jnp.zeros(17)))
    assert bench._work([Call(loop.decode, (model, state), {})]).decode_step_bytes == 3 + 5 + 11 + 4 * (13 + 17)


def test_shares_of_ceilings(rows):
    for row in rows:
        work, median = row.work, row.median
        assert row.shares["decode"] == pytest.approx(work.decode_step_bytes / 1e10 / median["decode_step_seconds"])
        assert row.shares["prefill"] == pytest.approx(work.prefill_flops / 1e9 / median["prefill_seconds"])
        if row.method == "default":
            least = (work.filter_flops - work.filter_int8_flops) / 1e9 + work.filter_int8_flops / 4e9
            assert row.shares["filter"] == pytest.approx(least / median["filter_seconds"])
        else:
            assert row.shares["filter"] is None


def test_measured_ceilings_are_above_what_this_model_reaches(rows, monkeypatch):
    """Starting its programs takes longer than their products, so that every share is well below 1."""
    monkeypatch.setattr(ceilings, "_SIDE_ON_CPU", 512)
    monkeypatch.setattr(ceilings, "_BYTES_ON_CPU", 2**24)
    measured = ceilings.measure("float32")
    shares = [share for row in rows for share in bench._shares(row.median, row.work, measured).values()]
    assert len([share for share in shares if share]) > 2 * len(rows)
    assert all(0 < share < 1.2 for share in shares if share is not None)


@pytest.mark.parametrize(
    ("files", "apart"),
    [
        ({"clear_refs": "", "status": "VmHWM:\t    12 kB\n"}, True),
        ({"clear_refs": "", "status": "VmRSS:\t    12 kB\n"}, False),
        ({"status": "VmHWM:\t    12 kB\n"}, False),
        ({}, False),
    ],
)
def test_memory_is_that_of_the_largest_program_where_the_system_tells_no_peak(
    rows, monkeypatch, tmp_path, files, apart
):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(bench, "_PROCESS", tmp_path)
    bench._reset_peak()
    assert bench.peak_memory() == (12 * 1024 if apart else 0)
    assert rows[0].memory == (rows[0].peak_bytes if apart else rows[0].work.largest_program_bytes)
    assert bench.memory_shown() == ("peak memory" if apart else "memory of the largest program")


def test_one_new_token_has_no_decode_step(model):
    (row,) = _measured(model, contestants(model)[:1], LENGTHS[:1], new_tokens=1)
    assert "decode_step_seconds" not in row.median
    assert row.shares["decode"] is None


def test_a_prompt_beyond_the_context_is_refused_before_any_run(model, monkeypatch):
    monkeypatch.setattr(bench, "_rows", None)  # called by a run
    message = refusal(_measured, model, contestants(model), [40, 300])
    assert "exceed the model's context of 256" in message


@pytest.mark.parametrize("name", ["default", "bm25"])
def test_a_budget_too_small_for_the_question_is_refused_before_any_run(model, monkeypatch, name):
    monkeypatch.setattr(bench, "_rows", None)
    small = Contestant(name, 4, model.method(name, keep=4))
    message = refusal(_measured, model, [*contestants(model)[:1], small], LENGTHS)
    assert "keep is 4, but the template and the question alone are" in message


def _main(monkeypatch, model, *given: str, loaded: list | None = None) -> None:
    """The command, on the tiny model in place of what it would load, which is appended to `loaded`."""

    def load(_, opened):
        if loaded is not None:
            loaded.append(opened)
        return model

    values = copy.deepcopy(command.FLAGS)
    values(["gemfilter bench", *given])
    monkeypatch.setattr(command, "FLAGS", values)
    monkeypatch.setattr(options, "load_pipeline", load)
    monkeypatch.setattr(ceilings, "measure", lambda _: CEILINGS)
    command.main([])


SMALL = (
    *("--lengths=70,74", f"--batches={BATCH}", "--method=default,bm25", f"--keep={KEEP}", "--filter_precision=int8"),
    *(f"--max_new_tokens={NEW_TOKENS}", "--repeats=2"),
)


def test_the_file_holds_all_runs_and_what_they_were_made_with(model, monkeypatch, tmp_path, capsys):
    made = tmp_path / "bench.json"
    attentions = "--filter_attentions=auto,dense"
    _main(monkeypatch, model, *SMALL, attentions, f"--output={made}", f"--plot={tmp_path / 'bench.png'}")
    told = json.loads(made.read_text())
    assert told["finished"]
    assert (told["lengths"], told["batches"], told["repeats"], told["new_tokens"]) == ([70, 74], [BATCH], 2, 4)
    assert len(told["rows"]) == 2 * 3
    assert {len(row["runs"]) for row in told["rows"]} == {2}
    assert told["ceilings"] == dataclasses.asdict(CEILINGS)
    weights = CONFIG.layers * (MATRICES + 2 * CONFIG.width) + CONFIG.width + CONFIG.vocab * CONFIG.width
    untied = 0 if model.checkpoint.model.lm_head is None else CONFIG.vocab * CONFIG.width
    assert told["shape"]["parameters"] == weights + untied
    assert told["shape"]["weight_bytes"] == 4 * (weights + untied)
    assert [told["shape"][name] for name in ("layers", "width", "heads", "kv_heads")] == [4, 32, 4, 2]
    assert (told["dtype"], told["weights"], told["attention"]) == ("float32", "float", "auto")
    assert told["mesh"] == {"data": 1, "seq": 1, "model": 1}
    assert told["environment"]["jax"]
    assert [one["options"].get("filter_attention") for one in told["methods"]] == ["auto", "dense", None]
    printed, remarks = capsys.readouterr()
    assert printed.count("default auto") == printed.count("default dense") == 2
    assert remarks.endswith(f"tokens, batch {BATCH}: 3 of 6 rows\n")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_is_cut_leaves_the_lengths_that_are_done(model, monkeypatch, tmp_path):
    made, measure, lengths = tmp_path / "bench.json", bench._rows, []

    def cut_at_the_second(model, contestants, example, *others):
        lengths.append(example.tokens)
        if len(lengths) > 1:
            raise KeyboardInterrupt
        return measure(model, contestants, example, *others)

    monkeypatch.setattr(bench, "_rows", cut_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        _main(monkeypatch, model, *SMALL, f"--output={made}")
    assert lengths == [70, 74]
    told = json.loads(made.read_text())
    assert (told["finished"], told["lengths"]) == (False, [70, 74])
    assert [row["method"] for row in told["rows"]] == ["default", "bm25"]
    assert os.listdir(tmp_path) == ["bench.json"]


def test_what_is_measured_is_shown_when_it_cannot_be_written(rows, model, monkeypatch, tmp_path, capsys):
    def full(path, _):
        raise UserError(f"{path}: cannot be written (No space left on device)")

    monkeypatch.setattr(bench, "run", lambda *_, **__: [rows[:4], rows[4:]])
    monkeypatch.setattr(files, "write_whole", full)
    made = tmp_path / "bench.json"
    assert "No space left" in (refusal(_main, monkeypatch, model, *SMALL, f"--output={made}") or "")
    shown = capsys.readouterr().out
    assert shown.count(f" {rows[0].prompt_tokens} ") >= 4  # the first length's rows; the second was not reached
    assert f" {rows[4].prompt_tokens} " not in shown


@pytest.mark.exhaustive
def test_a_killed_run_leaves_valid_json(tmp_path):
    model = gguf_files.write(tmp_path / "tiny.gguf", Folder.read(GOLDEN / "llama_gqa_tied"))
    made = tmp_path / "bench.json"
    run = [sys.executable, "-m", "gemfilter_jax.cli.main", "bench", f"--model={model}", f"--output={made}"]
    flags = ["--lengths=100,150,200", "--method=full,paper", "--keep=96", "--max_new_tokens=4", "--repeats=500"]
    with subprocess.Popen([*run, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        started = time.monotonic()
        while not made.exists() and running.poll() is None and time.monotonic() - started < 300:
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
    told = json.loads(made.read_text())
    assert not told["finished"]
    assert len(told["rows"]) in (2, 4)
    assert {len(row["runs"]) for row in told["rows"]} == {500}


def test_a_shape_is_loaded_with_random_weights(model, monkeypatch):
    loaded = []
    monkeypatch.setattr(bench, "run", lambda *_, **__: [])
    _main(monkeypatch, model, *SMALL, "--random_weights", "--shape=llama-3.1-8b", loaded=loaded)
    (opened,) = loaded
    assert isinstance(opened, RandomWeights)
    assert (opened.name, opened.config.layers) == ("llama-3.1-8b, random weights", 32)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--shape=llama-3.1-8b",), "--shape=llama-3.1-8b has no weights; give --random_weights as well"),
        (("--random_weights",), "--random_weights needs --shape=NAME"),
        (("--random_weights", "--shape=llama-3.1-8b", "--model=smollm2"), "--model=smollm2 and --shape=llama-3.1-8b"),
        (("--random_weights", "--shape=lama"), "'lama' is not a folder, a file or one of llama-3.1-70b"),
        (("--batches=0",), "--batches=0: '0' is not a whole number of at least 1"),
        (("--batches=1,1025",), "1025 is beyond 1,024 prompts"),
        (("--filter_attentions=dense", "--filter_attention=dense"), "--filter_attention is given too"),
        (("--filter_attentions=dense", "--method=full,bm25"), "is for default, paper, uncalibrated"),
    ],
)
def test_mistakes(model, monkeypatch, given, said):
    def load(*_, **__):
        raise AssertionError("the work is reached")

    monkeypatch.setattr(bench, "run", load)
    assert said in (refusal(_main, monkeypatch, model, *given) or "")
