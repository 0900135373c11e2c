"""Times this project beside what could be run in its place: same weights, prompt, threads and machine, in turn.

  python benchmarks/peers/compare.py RESULT.json --torch_python=.venv311/bin/python --llama_folder=FOLDER

writes RESULT.json, and a page of it to RESULT.md (page.py makes that alone). Every program is a process that loads the
default model once. After a warm-up run of each, each answers the prompt once in every round, one at a time, with 32 new
tokens by default. What cannot be run here is in both files with the reason.

  PyTorch        transformers, the paper's algorithm, SnapKV. An interpreter with the extra `parity`:
                 --torch_python=PATH, by default this one.
  llama.cpp      full attention on the quantised weights of the file. A folder with the npm packages node-llama-cpp and
                 @node-llama-cpp/linux-x64 (85 MB, see BUILD.md): --llama_folder=PATH, with node in the search path.
                 Nothing is downloaded or built here. Of four settings the fastest serves.

The whole prompt is some 70 tokens longer than --tokens. It needs about 6 GB of memory at 7,900 tokens, and Linux.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import page
from protocol import Worker, WorkerError

from gemfilter_jax import files
from gemfilter_jax.errors import UserError

_HERE = pathlib.Path(__file__).parent
_OWN, _FLOAT32, _BFLOAT16, _LLAMA = page.OWN, "PyTorch, float32", "PyTorch, bfloat16", "llama.cpp"


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way to answer the prompt.

    Attributes:
      program, method, weights: what it is, for people.
      worker: which process runs it. action: the method's name there.
      of_kept: it reads only the tokens that `paper` keeps here, so that it counts for decoding alone.
    """

    program: str
    method: str
    weights: str
    worker: str
    action: str
    of_kept: bool = False

    @property
    def fields(self) -> dict[str, str]:
        """How results name it."""
        return {"program": self.program, "method": self.method, "weights": self.weights}


def _of_torch(worker: str, weights: str) -> tuple[Peer, ...]:
    return (
        Peer("transformers", page.FULL, weights, worker, "full"),
        Peer("PyTorch", page.PAPER, weights, worker, "paper"),
        Peer("PyTorch", "SnapKV", weights, worker, "snapkv"),
    )


PEERS = (
    Peer(_OWN, page.PAPER, "float32", _OWN, "paper"),
    Peer(_OWN, page.DEFAULT, "float32", _OWN, "default"),
    Peer(_OWN, page.FULL, "float32", _OWN, "full"),
    *_of_torch(_FLOAT32, "float32"),
    *_of_torch(_BFLOAT16, "bfloat16"),
    Peer("llama.cpp", page.FULL, page.QUANTISED, _LLAMA, "full"),
    Peer("llama.cpp", "kept tokens", page.QUANTISED, _LLAMA, "kept", of_kept=True),
)


def _processor_seconds(worker: Worker) -> tuple[float, float]:
    """Seconds that all processors have worked so far, time stolen by other machines included, and for this worker."""
    user, nice, system, _, _, *interrupts = map(int, pathlib.Path("/proc/stat").read_text().split()[1:9])
    own = pathlib.Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    ticks = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + sum(interrupts)) / ticks, sum(map(int, own)) / ticks


def _timed(worker: Worker, action: str, request: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """A worker's answer, and the share of the machine's processors that others took meanwhile."""
    started, before = time.perf_counter(), _processor_seconds(worker)
    answer = worker.ask(action, **request)
    everyone, own = (now - then for now, then in zip(_processor_seconds(worker), before, strict=True))
    room = (time.perf_counter() - started) * (os.cpu_count() or 1)
    return answer, min(max(0.0, everyone - own) / room, 1.0)  # ticks are coarse


def measure(
    peers: Sequence[Peer],
    workers: Mapping[str, Worker],
    missing: Mapping[str, str],
    ids: Sequence[int],
    rounds: int,
) -> list[dict[str, Any]]:
    """What `page.markdown` calls peers; the first one is the paper's algorithm here, whose kept tokens others read.

    Args:
      workers: by name, loaded. missing: for names that are not among them, why not.
      ids: of the prompt.

    Raises:
      WorkerError: this project has failed. If another has, that is in its record.
    """
    found: list[dict[str, Any]] = [
        peer.fields | ({"not_measured": missing[peer.worker]} if peer.worker in missing else {"runs": []})
        for peer in peers
    ]
    for number in range(rounds + 1):
        for index, peer in enumerate(peers):
            record = found[index]
            if "not_measured" in record:
                continue
            told = f"round {number} of {rounds}" if number else "warm-up"
            print(f"{told}: {', '.join(peer.fields.values())}", file=sys.stderr)
            read = [ids[place] for place in found[0]["kept"]] if peer.of_kept else ids
            request = {"method": peer.action} | ({} if peer.worker == _OWN else {"ids": read})
            try:
                answer, others = _timed(workers[peer.worker], "run" if number else "warm_up", request)
            except WorkerError as error:
                if peer.worker == _OWN:
                    raise
                found[index] = peer.fields | {"not_measured": str(error)}
                continue
            seconds = answer.pop("seconds", None)
            record |= answer | {"prompt_tokens": len(read)}
            if number:
                record["runs"].append({"seconds": seconds, "others": round(others, 3)})
    return found


def _command(module: str, python: str = sys.executable) -> list[str]:
    return [python, str(_HERE / "protocol.py"), module]


def _started(
    stack: contextlib.ExitStack, arguments: argparse.Namespace, loaded: Mapping[str, Any]
) -> tuple[dict[str, Worker], dict[str, str], dict[str, str]]:
    """The other programs: workers by name, why there is none for others, and versions."""
    given = {"model": loaded["model"], "threads": arguments.threads, "new_tokens": arguments.new_tokens}
    of_torch = given | {"keep": arguments.keep, "layer": loaded["layer"]}
    torch = _command("torch_worker", arguments.torch_python)
    llama = ["node", str(_HERE / "llama_cpp_worker.mjs")]
    wanted = {
        _FLOAT32: (torch, of_torch | {"dtype": "float32"}),
        _BFLOAT16: (torch, of_torch | {"dtype": "bfloat16"}),
        _LLAMA: (llama, given | {"folder": arguments.llama_folder}),
    }
    workers, missing, versions = {}, {}, {}
    if not arguments.llama_folder:
        del wanted[_LLAMA]
        missing[_LLAMA] = "no --llama_folder was given"
    for name, (command, request) in wanted.items():
        try:
            worker = stack.enter_context(contextlib.closing(Worker(command)))
            versions |= worker.ask("load", **request)["versions"]
            workers[name] = worker
        except WorkerError as error:
            missing[name] = str(error)
            print(f"{name} is not measured: {error}", file=sys.stderr)
    return workers, missing, versions


def _processor() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")


def _compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """The result; raises `WorkerError` if this project cannot be measured."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])  # of the workers too
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(contextlib.closing(Worker(_command("own_worker"))))
        given = {name: getattr(arguments, name) for name in ("tokens", "new_tokens", "keep")}
        loaded = own.ask("load", **given)
        workers, missing, versions = _started(stack, arguments, loaded)
        peers = measure(PEERS, {_OWN: own} | workers, missing, loaded["ids"], arguments.rounds)
        texts = own.ask("decode", answers=[peer.get("tokens", []) for peer in peers])["texts"]
    kept_here = set(peers[0].pop("kept"))
    for peer, text in zip(peers, texts, strict=True):
        if "tokens" in peer:
            peer["answer"] = text
        if "kept" in peer:
            peer["kept_as_here"] = len(kept_here.intersection(peer.pop("kept")))
    return {
        "versions": loaded["versions"] | versions,
        "processor": _processor(),
        "model": pathlib.Path(loaded["model"]).name,
        "bits": {"float32": 32, "bfloat16": 16, page.QUANTISED: loaded["bits"]},
        "prompt_tokens": len(loaded["ids"]),
        "layer": loaded["layer"],
        **{name: getattr(arguments, name) for name in ("new_tokens", "keep", "threads", "rounds")},
        "peers": peers,
    }


def _number(least: int, most: int | None = None) -> Callable[[str], int]:
    """A type of argparse."""

    def parse(text: str) -> int:
        expected = f"a number of at least {least}" if most is None else f"a number from {least} to {most}"
        if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
            raise argparse.ArgumentTypeError(f"{text!r} was given, expected {expected}")
        return int(text)

    return parse


def _main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="the result, JSON; the page gets the same name with .md")
    parser.add_argument("--tokens", type=_number(1), default=7900, help="of the text (%(default)s)")
    parser.add_argument("--new_tokens", type=_number(2), default=32, help="of each answer (%(default)s)")
    parser.add_argument("--keep", type=_number(64), default=512, help="tokens that methods keep (%(default)s)")
    parser.add_argument("--rounds", type=_number(1), default=3, help="runs of each, after a warm-up (%(default)s)")
    parser.add_argument("--threads", type=_number(1, cores), default=cores, help="of each program (all: %(default)s)")
    parser.add_argument("--torch_python", default=sys.executable, help="interpreter with PyTorch (this one)")
    parser.add_argument("--llama_folder", help="folder whose node_modules holds node-llama-cpp (none)")
    arguments = parser.parse_args()
    written = pathlib.Path(arguments.output).with_suffix(".md")
    if str(written) == arguments.output:
        parser.error(f"{arguments.output} is the page's name; give a name for the JSON file, such as RESULT.json")
    try:
        for path in (arguments.output, str(written)):
            files.check_writable(path, "output")
        result = _compare(arguments)
        files.write_whole(arguments.output, json.dumps(result, indent=1) + "\n")
        files.write_whole(written, page.markdown(result))
    except (UserError, WorkerError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    _main()
