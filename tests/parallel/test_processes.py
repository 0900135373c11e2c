"""Two processes on loopback give one answer, as one process does, and none is left waiting for one that is gone."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
from commands import assert_mistake, gemfilter
from model_files import GOLDEN, tokenizer

from gemfilter_jax import pipeline

_SUM = """
import sys
import time

from absl import flags

from gemfilter_jax.parallel import processes
from gemfilter_jax.cli import command, options
from gemfilter_jax.errors import UserError

FLAGS = flags.FlagValues()
options.define_distributed(FLAGS)
flags.DEFINE_integer("late", -1, "The process that never comes to the sum.", flag_values=FLAGS)
flags.DEFINE_integer("wrong", -1, "The process that finds a mistake.", flag_values=FLAGS)


def main(_):
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((4,), ("x",))
    values = np.arange(32, dtype=np.float32)
    split = NamedSharding(mesh, PartitionSpec("x"))
    x = jax.make_array_from_callback(values.shape, split, lambda index: values[index])
    total = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.psum((x * x).sum(), "x"), mesh=mesh, in_specs=split.spec, out_specs=PartitionSpec()
        )
    )
    print("sums", file=sys.stderr, flush=True)
    if FLAGS.process == FLAGS.late:
        time.sleep(600)
    if FLAGS.process == FLAGS.wrong:
        raise UserError("a mistake")
    result = float(total(x))
    if processes.is_first():
        print(result)


sys.argv[0] = "sum"
command.run(main, FLAGS, "")
"""
SUM = [sys.executable, "-c", _SUM]
GEMFILTER = [sys.executable, "-m", "gemfilter_jax.cli.main"]
UNFINISHED = "unfinished, because another process of the run ended"


class Process:
    """A process on forced CPU devices, whose standard error is read as it comes."""

    def __init__(self, program: list, devices: int, **variables: str):
        environment = os.environ | {
            # Programs are compiled faster so; what they compute is a few numbers of a tiny model.
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
            "JAX_PLATFORMS": "cpu",
        }
        environment |= variables
        self.popen = subprocess.Popen(
            program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.summing = threading.Event()
        self.errors: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.popen.stderr:
            self.errors.append(line.rstrip("\n"))
            if line == "sums\n":
                self.summing.set()

    def end(self, timeout: float = 60) -> tuple[int, str]:
        """Status and standard output, once it and all that speaks for it has ended."""
        self._reader.join(timeout)
        self.popen.kill()
        return self.popen.wait(), self.popen.stdout.read()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(*program: str) -> list[Process]:
    """A run of two processes of two devices each."""
    run = [*program, f"--coordinator=127.0.0.1:{free_port()}", "--processes=2"]
    return [Process([*run, f"--process={index}"], devices=2) for index in range(2)]


def test_sum_over_all_devices():
    alone = Process(SUM, devices=4)
    first, second = start(*SUM)
    assert alone.end() == first.end() == (0, f"{float(np.square(np.arange(32.0)).sum())}\n")
    assert second.end() == (0, "")
    assert UNFINISHED not in "".join(first.errors + second.errors)


def test_the_environment_tells():
    job = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1", "SLURM_NTASKS": "2"}
    job["JAX_COORDINATOR_PORT"] = str(free_port())
    first, second = (
        Process([*SUM, "--distributed"], devices=2, SLURM_PROCID=index, SLURM_LOCALID=index, **job) for index in "01"
    )
    assert first.end() == (0, f"{float(np.square(np.arange(32.0)).sum())}\n"), first.errors
    assert second.end() == (0, "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "phi4"
    shutil.copytree(GOLDEN / "phi4_partial", folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.exhaustive
def test_an_evaluation_that_stopped_goes_on_in_all_processes(folder, tmp_path):
    """From the lines that the first process alone has; here those of a run of one process."""
    output, task = tmp_path / "results.jsonl", ("--task=hidden_facts", "--count=12", "--distractors=0")
    command = (
        *(*GEMFILTER, "evaluate", f"--model={folder}", *task, "--lengths=60", "--keep=32", "--filter_layer=1"),
        *("--method=full,default", f"--output={output}"),
    )

    def without_seconds(lines: list[str]) -> list[dict]:
        return [json.loads(line) | {"seconds": None} for line in lines]

    assert Process([*command], devices=1).end(120)[0] == 0
    whole = output.read_text().splitlines()
    assert len(whole) == 1 + 12 * 2
    assert not any(json.loads(line)["error"] for line in whole[1:])
    output.write_text("\n".join(whole[:8]) + '\n{"length": 60, "num')
    first, second = start(*command, "--mesh=seq:2,model:2")
    status, shown = first.end(120)
    assert (status, "Hidden facts" in shown) == (0, True), first.errors
    assert second.end(120) == (0, ""), second.errors
    again = output.read_text().splitlines()
    assert again[:8] == whole[:8]
    assert without_seconds(again) == without_seconds(whole)


def test_generate_answers_once_on_a_mesh_of_all_devices(folder, tmp_path):
    book, text, question = tmp_path / "book.txt", "a b b " * 30, "b a ?"
    book.write_text(text)
    asked, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    asked.write_text("".join(f'{{"prompt": "{"b a a " * (20 + n)}", "question": "a b ?"}}\n' for n in range(3)))
    settings = (f"--model={folder}", "--keep=32", "--filter_layer=1", "--max_new_tokens=6")
    one = start(
        *(*GEMFILTER, "generate", *settings, "--mesh=seq:2,model:2", f"--prompt_file={book}"),
        *(f"--question={question}", f"--report={tmp_path}/page.html"),
    )
    many = start(*GEMFILTER, "generate", *settings, f"--prompts={asked}", f"--output={answers}", "--verbosity=0")
    model = pipeline.load(str(folder), dtype="float32")
    method = model.method(keep=32, filter_layer=1)
    expected = model.generate(text, question, method=method, max_new_tokens=6)
    status, output = one[0].end(120)
    assert (status, output) == (0, expected.text + "\n"), one[0].errors
    assert (tmp_path / "page.html").exists()
    assert one[1].end(120) == (0, "")
    assert [sum("kept 32" in line for line in process.errors) for process in one] == [1, 0]

    assert many[0].end(120) == (0, ""), many[0].errors
    assert many[1].end(120) == (0, "")
    for process in many:
        assert any("mesh: data:4,seq:1,model:1" in line for line in process.errors), process.errors
    assert [sum("answered 3, failed 0" in line for line in process.errors) for process in many] == [1, 0]
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    prompts = [json.loads(line)["prompt"] for line in asked.read_text().splitlines()]
    wanted = [model.generate(prompt, "a b ?", method=method, max_new_tokens=6) for prompt in prompts]
    assert [line["text"] for line in lines] == [one.text for one in wanted]
    assert [line["indices"] for line in lines] == [list(one.selection.indices) for one in wanted]


@pytest.mark.exhaustive
def test_none_is_left_waiting():
    signals = {0: signal.SIGTERM, 1: signal.SIGKILL}
    statuses = {0: 128 + signal.SIGTERM, 1: -signal.SIGKILL}
    killed = {victim: start(*SUM, f"--late={victim}") for victim in signals}
    mistaken = {victim: start(*SUM, f"--wrong={victim}") for victim in range(2)}
    for victim, run in killed.items():
        for process in run:
            assert process.summing.wait(60), process.errors
        run[victim].popen.send_signal(signals[victim])
    for victim, run in killed.items():
        status, output = run[1 - victim].end()
        assert (status != 0, output) == (True, "")
        assert run[1 - victim].errors[-1].startswith(f"sum: {UNFINISHED}")
        assert run[victim].end() == (statuses[victim], "")
    for victim, run in mistaken.items():
        assert run[victim].end() == (2, "")
        assert run[victim].errors[-1] == "sum: a mistake"
        status, output = run[1 - victim].end()
        assert (status != 0, output) == (True, "")
        assert run[1 - victim].errors[-1].startswith(f"sum: {UNFINISHED}")


def test_the_same_mistake_of_all_is_told_by_each(tmp_path):
    for process in start(*GEMFILTER, "select", f"--prompt_file={tmp_path}/no.txt"):
        assert process.end() == (2, "")
        assert "No such file" in process.errors[-1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--coordinator=host:1234",), ("--processes", "missing")),
        (("--coordinator=host:1234", "--processes=2"), ("--process ", "missing")),
        (("--processes=2", "--process=0"), ("--coordinator", "missing")),
        (("--coordinator=host:1234", "--processes=2", "--process=2"), ("--process=2", "0 to 1")),
        (("--coordinator=host:1234", "--processes=0", "--process=0"), ("--processes=0",)),
        (("--coordinator=host", "--processes=2", "--process=0"), ("--coordinator=host", "HOST:PORT")),
        (("--coordinator=host:0", "--processes=2", "--process=0"), ("--coordinator=host:0", "HOST:PORT")),
        (("--distributed", "--process=1"), ("--process", "--distributed", "one of the two")),
        (("--distributed",), ("--distributed", "the environment does not tell", "--coordinator")),
    ],
)
def test_mistakes(flags, said):
    assert_mistake(gemfilter("generate", *flags, stdin=b"text"), *said)


def test_port_in_use():
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        coordinator = f"--coordinator=127.0.0.1:{listener.getsockname()[1]}"
        result = gemfilter("generate", coordinator, "--processes=2", "--process=0", stdin=b"text")
    assert_mistake(result, coordinator, "cannot listen", "in use")
