"""Times Hugging Face transformers (PyTorch) and this project on the same weights, prompt and machine, in one run.

  python benchmarks/bench_transformers.py RESULT.json --tokens=7900 --torch_python=.venv311/bin/python

PyTorch runs in a process of its own, under the interpreter that has the extra `parity`, in float32 and in bfloat16; the
faster one is what counts. Every run writes 32 tokens and is timed after one that compiles or warms up. The default rule
is timed twice before PyTorch and twice after it, so that a machine's drift meets both; the median counts.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time

_NEW_TOKENS = 32


def _torch_half() -> None:
    """Token ids on standard input, seconds of each dtype on standard output, both as JSON."""
    import torch
    import transformers

    from gemfilter_jax.checkpoints import embedded

    path, ids = embedded.locate(), torch.tensor([json.load(sys.stdin)])
    settings = {"do_sample": False, "min_new_tokens": _NEW_TOKENS, "max_new_tokens": _NEW_TOKENS, "pad_token_id": 0}
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=dtype,
            quantization_config=transformers.GgufConfig(dequantize=True),  # products of packed weights are slower
        ).eval()
        with torch.no_grad():
            model.generate(ids[:, :256], **settings)
            started = time.perf_counter()
            model.generate(ids, **settings)
            seconds[str(dtype).removeprefix("torch.")] = time.perf_counter() - started
    versions = {"torch": torch.__version__, "transformers beside torch": transformers.__version__}
    print(json.dumps({"seconds": seconds, "versions": versions}))


def _own_seconds(model, case, name: str, repeats: int) -> list[dict[str, float]]:
    """By stage, of each run."""
    import gemfilter_jax
    from gemfilter_jax.timing import COMPILE

    endless = dataclasses.replace(model, checkpoint=dataclasses.replace(model.checkpoint, stop_tokens=()))
    method = gemfilter_jax.Full() if name == "full" else model.method()
    runs = []
    for _ in range(1 + repeats):
        timings = endless.generate(case.text, case.question, method=method, max_new_tokens=_NEW_TOKENS).timings
        runs.append({stage: seconds for stage, seconds in timings.items() if stage != COMPILE})
    return runs[1:]


def _main(output: str, tokens: int, torch_python: str) -> None:
    import gemfilter_jax
    from gemfilter_jax import files
    from gemfilter_jax.evals import bench
    from gemfilter_jax.evals.tasks.needles import Needles
    from gemfilter_jax.text.prompt import encode

    model = gemfilter_jax.load("smollm2")
    case = next(Needles(depths=(0.5,)).examples(model.checkpoint.tokenizer, tokens))
    prompt = encode(model.checkpoint.tokenizer, case.text, case.question, window=0)
    runs = {"full": _own_seconds(model, case, "full", 1), "default": _own_seconds(model, case, "default", 2)}
    command = [torch_python, __file__, "--torch_half"]
    ran = subprocess.run(command, input=json.dumps(prompt.ids.tolist()), stdout=subprocess.PIPE, text=True, check=True)
    torch = json.loads(ran.stdout.splitlines()[-1])
    runs["default"] += _own_seconds(model, case, "default", 2)
    seconds = {f"transformers, {dtype}": taken for dtype, taken in torch["seconds"].items()}
    best = min(seconds.values())
    seconds |= {f"gemfilter_jax, {name}": statistics.median(sum(run.values()) for run in runs[name]) for name in runs}
    for name, taken in seconds.items():
        print(f"{name:36} {taken:7.2f} s   transformers' best / this: {best / taken:.2f}")
    result = {
        "environment": bench.environment() | torch["versions"],
        "prompt_tokens": len(prompt),
        "new_tokens": _NEW_TOKENS,
        "seconds": seconds,
        "runs": runs,
        "ratio": {name: best / taken for name, taken in seconds.items()},
    }
    files.write_whole(output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", help="result file, JSON")
    parser.add_argument("--tokens", type=int, default=7900, help="of the text")
    parser.add_argument("--torch_python", default=sys.executable, help="interpreter that has PyTorch")
    parser.add_argument("--torch_half", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.torch_half:
        _torch_half()
    elif arguments.output is None:
        parser.error("a result file is needed, for example benchmarks/transformers_8k_cpu.json")
    else:
        _main(arguments.output, arguments.tokens, arguments.torch_python)
