"""Times this project beside what could be run in its place: same weights, prompt, threads and machine, in turn.

  python benchmarks/peers/compare.py RESULT.json --torch_python=.venv311/bin/python --llama_folder=FOLDER

writes RESULT.json, and a page of it to RESULT.md (page.py makes that alone). Every program is a process that loads the
default model once. After a warm-up run of each, each answers the prompt once in every round, one at a time, with 32 new
tokens by default. What cannot be run here is in both files with the reason.

  PyTorch        transformers, the paper's algorithm, SnapKV. An interpreter with the extra `parity`:
                 --torch_python=PATH, by default this one.
  llama.cpp      full attention on the quantised weights of the file; and decoding of kept tokens at other numbers of
                 bits, on files made of that one. A folder with the npm packages node-llama-cpp and
                 @node-llama-cpp/linux-x64 (85 MB, see BUILD.md): --llama_folder=PATH, with node in the search path.
                 Nothing is downloaded or built here. Of four settings the fastest serves.

The whole prompt is some 70 tokens longer than --tokens. It needs about 9 GB of memory at 7,900 tokens, 1 GB for
temporary files, and Linux.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gguf_weights
import page
from protocol import Worker, WorkerError

from gemfilter_jax import files
from gemfilter_jax.errors import UserError

_HERE = pathlib.Path(__file__).parent
_OWN, _TORCH, _LLAMA = page.OWN, "PyTorch", "llama.cpp"
_OWN_WEIGHTS = {"float32": {}, "bfloat16": {"dtype": "bfloat16"}, "int8": {"weights": "int8"}}
"""How `gemfilter_jax.load` gets them."""
_LLAMA_WEIGHTS = {"float32": "F32", "float16": "F16", "Q8_0": "Q8_0"}
"""How GGUF names them; beside those that the file holds."""


def _worker(kind: str, weights: str) -> str:
    """The name of a worker."""
    return f"{kind}, {weights}"


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


def _own(method: str, weights: str, action: str) -> Peer:
    return Peer(_OWN, method, weights, _worker(_OWN, weights), action)


def _of_torch(weights: str) -> tuple[Peer, ...]:
    worker = _worker(_TORCH, weights)
    return (
        Peer("transformers", page.FULL, weights, worker, "full"),
        Peer("PyTorch", page.PAPER, weights, worker, "paper"),
        Peer("PyTorch", "SnapKV", weights, worker, "snapkv"),
    )


def _of_kept(weights: str) -> Peer:
    return Peer(_LLAMA, "kept tokens", weights, _worker(_LLAMA, weights), "kept", of_kept=True)


PEERS = (
    _own(page.PAPER, "float32", "paper"),
    *(_own(page.DEFAULT, weights, "default") for weights in _OWN_WEIGHTS),
    _own(page.FULL, "float32", "full"),
    *_of_torch("float32"),
    *_of_torch("bfloat16"),
    Peer(_LLAMA, page.FULL, page.QUANTISED, _worker(_LLAMA, page.QUANTISED), "full"),
    *(_of_kept(weights) for weights in (page.QUANTISED, *_LLAMA_WEIGHTS)),
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
            request = {"method": peer.action} | ({} if peer.program == _OWN else {"ids": read})
            try:
                answer, others = _timed(workers[peer.worker], "run" if number else "warm_up", request)
            except WorkerError as error:
                if peer.program == _OWN:
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


def _llama_files(stack: contextlib.ExitStack, model: str) -> dict[str, pathlib.Path]:
    """What llama.cpp reads, by the name of the weights; the stack removes what is made here."""
    folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    made = {weights: folder / f"{weights}.gguf" for weights in _LLAMA_WEIGHTS}
    for weights, path in made.items():
        gguf_weights.convert(pathlib.Path(model), path, _LLAMA_WEIGHTS[weights])
    return {page.QUANTISED: pathlib.Path(model), **made}


def _others(
    stack: contextlib.ExitStack, arguments: argparse.Namespace, model: str, layer: int
) -> tuple[dict[str, Worker], dict[str, dict[str, Any]], dict[str, str]]:
    """Workers of other programs by name, what each says of itself, and why there is none for others."""
    given = {"threads": arguments.threads, "new_tokens": arguments.new_tokens}
    command = _command("torch_worker", arguments.torch_python)
    of_torch = given | {"model": model, "keep": arguments.keep, "layer": layer}
    wanted = {
        _worker(_TORCH, dtype): (command, of_torch | {"dtype": dtype}, bits)
        for dtype, bits in (("float32", 32), ("bfloat16", 16))
    }
    missing = {}
    if arguments.llama_folder:
        command = ["node", str(_HERE / "llama_cpp_worker.mjs")]
        for weights, path in _llama_files(stack, model).items():
            request = given | {"model": str(path), "folder": arguments.llama_folder}
            wanted[_worker(_LLAMA, weights)] = (command, request, gguf_weights.bits(path))
    else:
        missing = {peer.worker: "no --llama_folder was given" for peer in PEERS if peer.program == _LLAMA}
    workers, loaded = {}, {}
    for name, (command, request, bits) in wanted.items():
        try:
            worker = stack.enter_context(contextlib.closing(Worker(command)))
            loaded[name] = worker.ask("load", **request) | {"bits": bits}
            workers[name] = worker
        except WorkerError as error:
            missing[name] = str(error)
            print(f"{name} is not measured: {error}", file=sys.stderr)
    return workers, loaded, missing


def _processor() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")


def _compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """The result; raises `WorkerError` if this project cannot be measured."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])  # of the workers too
    with contextlib.ExitStack() as stack:
        own, loaded = {}, {}
        given = {name: getattr(arguments, name) for name in ("tokens", "new_tokens", "keep")}
        for weights, options in _OWN_WEIGHTS.items():
            name = _worker(_OWN, weights)
            own[name] = stack.enter_context(contextlib.closing(Worker(_command("own_worker"))))
            loaded[name] = own[name].ask("load", **given, options=options)
        first = next(iter(loaded.values()))
        others, more, missing = _others(stack, arguments, first["model"], first["layer"])
        records = measure(PEERS, own | others, missing, first["ids"], arguments.rounds)
        answers = [record.get("tokens", []) for record in records]
        texts = next(iter(own.values())).ask("decode", answers=answers)["texts"]
    loaded |= more
    kept_here = set(records[0].pop("kept"))
    for peer, record, text in zip(PEERS, records, texts, strict=True):
        if "runs" not in record:
            continue
        record |= {"bits": loaded[peer.worker]["bits"], "answer": text}
        if "kept" in record:
            record["kept_as_here"] = len(kept_here.intersection(record.pop("kept")))
    return {
        "versions": {name: version for one in loaded.values() for name, version in one["versions"].items()},
        "processor": _processor(),
        "model": pathlib.Path(first["model"]).name,
        "prompt_tokens": len(first["ids"]),
        "layer": first["layer"],
        **{name: getattr(arguments, name) for name in ("new_tokens", "keep", "threads", "rounds")},
        "peers": records,
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
    except (UserError, WorkerError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    _main()
