#!/bin/sh
# Checks the kernels and the attention of this machine's GPU, then times them. No network, no model; under 8 minutes.
set -eu

usage() {
    cat <<'USAGE'
usage: launch/gpu_check.sh [RESULT.json]

Compares every implementation of selection scores and of attention with float64 NumPy, then times them at 8,192 to
1,048,576 tokens (32 heads, 8 key heads, width 128, bfloat16). The result, gpu_check.json if not named, holds device,
versions, shapes and the reason wherever an implementation does not serve. The exit status is 1 if a check fails.

PYTHON   the interpreter, which has jax for GPUs, einops and absl-py (default: python3)
USAGE
}

case ${1:-} in
-h | --help)
    usage
    exit 0
    ;;
esac
python=${PYTHON:-python3}
result=$(realpath -m "${1:-gpu_check.json}")
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

"$python" - <<'CHECK'
import importlib.util
import sys

missing = [name for name in ("jax", "einops", "absl") if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"{sys.executable} lacks {', '.join(missing)}; name an interpreter that has them in PYTHON")
import jax

if jax.default_backend() != "gpu":
    sys.exit(f"jax {jax.__version__} of {sys.executable} finds no GPU, only {jax.devices()}")
CHECK

exec timeout 480 "$python" benchmarks/bench_kernels.py "$result" --lengths=8192,32768,131072,1048576 \
    --longest_attention=131072 --repeats=5
