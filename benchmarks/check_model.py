"""Compares the default model on this device with what PyTorch computed, and checks needles that it has answered.

  python benchmarks/check_model.py RESULT.json [--needles=LINES.jsonl]

The likeliest next tokens of 1,000 positions come from tests/golden/smollm2_top1.npz. LINES is a result of
`gemfilter evaluate --task=needles --method=default,full`. The exit status is 1 if a share is too small.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from gemfilter_jax import files, pipeline

_ROOT = pathlib.Path(__file__).parents[1]
_LEAST_AGREEMENT = {"float32": 0.99, "bfloat16": 0.9}  # bfloat16 rounds logits that are closer than 1 in 256 together
_LEAST_NEEDLES = {"kept": 1.0, "right": 0.8}


def _agreement(dtype: str) -> float:
    """Share of positions whose likeliest next token is PyTorch's in float32."""
    sys.path.append(str(_ROOT / "tests"))
    from model_outputs import top1_and_last_logits

    model = pipeline.load("smollm2", dtype=dtype).checkpoint.model
    with np.load(_ROOT / "tests" / "golden" / "smollm2_top1.npz") as stored:
        top1, _ = top1_and_last_logits(model, stored["ids"])
        return float(np.mean(np.asarray(top1) == stored["top1"]))


def _needles(path: str) -> list[dict[str, Any]]:
    """Shares of needles that each method kept and answered."""
    lines = [json.loads(line) for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines()]
    trials = [line for line in lines if "scores" in line]
    found = []
    for method in ("default", "full"):
        scores = [trial["scores"] for trial in trials if trial["method"] == method]
        for name, least in _LEAST_NEEDLES.items():
            share = float(np.mean([one[name] for one in scores])) if scores else 0.0
            found.append({"of": f"needles {name} by {method}", "share": share, "least": least})
    return found


def _main(arguments: argparse.Namespace) -> int:
    checks = [
        {"of": f"likeliest tokens in {dtype}", "share": _agreement(dtype), "least": least}
        for dtype, least in _LEAST_AGREEMENT.items()
    ]
    checks += _needles(arguments.needles) if arguments.needles else []
    device = jax.devices()[0].device_kind
    result = {"device": device, "jax": jax.__version__, "checks": checks}
    files.write_whole(arguments.output, json.dumps(result, indent=1) + "\n")
    wrong = [check for check in checks if check["share"] < check["least"]]
    for check in checks:
        print(f"{check['of']}: {check['share']:.3f}{' is TOO FEW' if check in wrong else ''}")
    return bool(wrong)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="the result, JSON")
    parser.add_argument("--needles", help="lines of `gemfilter evaluate --task=needles --method=default,full`")
    sys.exit(_main(parser.parse_args()))
