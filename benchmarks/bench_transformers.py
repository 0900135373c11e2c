"""Times Hugging Face transformers (PyTorch) and this project on the same weights, prompt and machine, in one process.

Run where the extra `parity` is installed: python benchmarks/bench_transformers.py RESULT.json [TOKENS]. PyTorch runs in
float32 and in bfloat16, and the faster one is what counts. Every run writes 32 tokens.
"""

import dataclasses
import json
import sys
import time

import torch
import transformers
from transformers import AutoModelForCausalLM

import gemfilter_jax
from gemfilter_jax import files
from gemfilter_jax.checkpoints import embedded
from gemfilter_jax.evaluation import bench, needle
from gemfilter_jax.prompts import encode

_NEW_TOKENS = 32
_METHODS = ("default", "full")


def _transformers_seconds(ids: list[int], dtype: torch.dtype) -> float:
    path = embedded.locate()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype).eval()
    prompt = torch.tensor([ids])
    settings = {"do_sample": False, "min_new_tokens": _NEW_TOKENS, "max_new_tokens": _NEW_TOKENS, "pad_token_id": 0}
    with torch.no_grad():
        model.generate(prompt[:, :256], **settings)
        started = time.perf_counter()
        model.generate(prompt, **settings)
        return time.perf_counter() - started


def _own_seconds(model: gemfilter_jax.Pipeline, case, name: str) -> float:
    endless = dataclasses.replace(model, checkpoint=dataclasses.replace(model.checkpoint, stop_tokens=()))
    method = gemfilter_jax.Full() if name == "full" else model.method()
    timings = {}
    for _ in range(2):  # the first to compile
        result = endless.generate(case.text, case.question, method=method, max_new_tokens=_NEW_TOKENS)
        timings = result.timings
    return sum(seconds for stage, seconds in timings.items() if stage != "compile")


def _main(output: str, tokens: int) -> None:
    model = gemfilter_jax.load("smollm2")
    case = next(needle.cases(model.checkpoint.tokenizer, tokens, depths=(0.5,)))
    prompt = encode(model.checkpoint.tokenizer, case.text, case.question, window=0)
    rows = {
        f"transformers, {str(dtype).removeprefix('torch.')}": _transformers_seconds(prompt.ids.tolist(), dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    best = min(rows.values())
    rows |= {f"gemfilter_jax, {name}": _own_seconds(model, case, name) for name in _METHODS}
    for name, seconds in rows.items():
        print(f"{name:36} {seconds:7.2f} s   transformers' best / this: {best / seconds:.2f}")
    result = {
        "environment": bench.environment() | {"torch": torch.__version__, "transformers": transformers.__version__},
        "prompt_tokens": len(prompt),
        "new_tokens": _NEW_TOKENS,
        "seconds": rows,
        "ratio": {name: best / seconds for name, seconds in rows.items()},
    }
    files.write_whole(output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 7900)
