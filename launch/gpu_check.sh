#!/bin/sh
# Checks kernels and answers on this machine's GPU, and times them, in parts that take less than eight minutes each.
set -eu

usage() {
    cat <<'USAGE'
usage: launch/gpu_check.sh [kernels|model|bench|long] [FOLDER]

Without the name of a part it runs all four, in at most 25 minutes. Each part writes what it has measured to FOLDER
(default: gpu_check) as it goes, so that a run which is cut leaves the rest.

kernels  every implementation of selection scores and of attention against float64 NumPy, and their times at 8,192 to
         1,048,576 tokens (32 heads, 8 key heads, width 128, bfloat16): kernels.json
model    the default model against what PyTorch computed, and 12 needles in 4,096 tokens: model.json, needles.jsonl
bench    full attention and the default rule at 8,000, 32,000 and 130,000 tokens; Llama-3.1-8B's shape, random weights,
         bfloat16, which need 40 GB on the GPU: bench.json
long     the same shape and 1,000,000 tokens, by the default rule alone: long.json

The exit status is 1 if a check fails or a part does not end in its time, and 2 if something is missing.

environment:
PYTHON   the interpreter, which has gemfilter_jax's requirements and jax for GPUs, such as .venv-gpu/bin/python of
         launch/gpu_node.sh; kernels needs jax, einops and absl-py alone (default: python3)
USAGE
}

fail() {
    echo "gpu_check.sh: $1" >&2
    exit 2
}

parts="kernels model bench long"
case ${1:-} in
-h | --help)
    usage
    exit 0
    ;;
-*) fail "$1: unknown; see --help" ;;
kernels | model | bench | long)
    parts=$1
    shift
    ;;
esac
[ $# -le 1 ] || fail "$2: unknown; expected one part and one folder, see --help"
python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "$python is missing; name an interpreter in PYTHON"
folder=$(realpath -m "${1:-gpu_check}")
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

needed="jax einops absl"
[ "$parts" = kernels ] || needed="$needed flax transformers gguf safetensors bm25s optax orbax rich scipy"
missing=$("$python" -c "
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))" $needed)
[ -z "$missing" ] || fail "$python lacks $missing; pip install -e '.[gpu]' there, or name another in PYTHON"
found=$("$python" -c "import jax; print(jax.default_backend(), jax.__version__, *jax.devices())" 2>/dev/null) || found=
[ "${found%% *}" = gpu ] || fail "jax of $python finds no GPU, only: ${found:-nothing}; see nvidia-smi and jax[cuda13]"
mkdir -p "$folder" 2>/dev/null && [ -w "$folder" ] || fail "$folder cannot be written; name another folder"

gemfilter() {
    seconds=$1
    shift
    timeout "$seconds" "$python" -m gemfilter_jax.cli.main "$@"
}

bench() {
    seconds=$1
    shift
    gemfilter "$seconds" bench --random_weights --shape=llama-3.1-8b --dtype=bfloat16 --keep=1024 --batches=1 "$@"
}

run() {
    case $1 in
    kernels)
        timeout 420 "$python" benchmarks/bench_kernels.py "$folder/kernels.json" --repeats=5 \
            --lengths=8192,32768,131072,1048576 --longest_attention=131072
        ;;
    model)
        gemfilter 150 evaluate --task=needles --lengths=4096 --keep=512 --method=default,full \
            --output="$folder/needles.jsonl" &&
            timeout 120 "$python" benchmarks/check_model.py "$folder/model.json" --needles="$folder/needles.jsonl"
        ;;
    bench) bench 460 --method=default,full --repeats=2 --lengths=8000,32000,130000 --output="$folder/bench.json" ;;
    long) bench 300 --method=default --repeats=1 --lengths=1000000 --output="$folder/long.json" ;;
    esac
}

failed=
for part in $parts; do
    echo "$part, results in $folder" >&2
    run "$part" || failed="$failed $part"
done
[ -z "$failed" ] || {
    echo "gpu_check.sh: not passed:$failed" >&2
    exit 1
}
