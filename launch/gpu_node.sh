#!/bin/sh
# Runs gemfilter on the GPUs of this node, or of all nodes of a Slurm job, in an environment that it makes at first.
set -eu

usage() {
    cat <<'USAGE'
usage: launch/gpu_node.sh [COMMAND [FLAG]...]

Runs `gemfilter COMMAND FLAG...` on the GPUs of this machine, such as
  launch/gpu_node.sh generate --prompt_file=book.txt --question="Who is the narrator?"
Without a command it only makes the environment. In a Slurm job (of sbatch or salloc) it runs, with --distributed, one
process for each GPU of each node, by srun, such as
  sbatch --nodes=2 --gpus-per-node=8 launch/gpu_node.sh generate ...    # submitted in the checkout
Several nodes without Slurm: run it on each with --coordinator, --processes and --process.

VENV                 the environment, on a file system of all nodes (default: .venv-gpu in the checkout)
PYTHON               what makes it, a Python 3.11, 3.12 or 3.13 with venv (default: the best that is found)
GPUS                 in a Slurm job, the GPUs of a node to use (default: all that nvidia-smi lists)
PORT                 in a Slurm job, where the first process listens (default: from SLURM_JOB_ID, as JAX does)
SLURM_JOB_ID         set by Slurm
SLURM_JOB_NUM_NODES  set by Slurm
SLURM_SUBMIT_DIR     set by Slurm; the checkout, if the script itself was submitted
USAGE
}

case ${1:-} in
-h | --help)
    usage
    exit 0
    ;;
esac
root=$(cd "$(dirname "$0")/.." && pwd)
[ -e "$root/launch/common.sh" ] || root=${SLURM_SUBMIT_DIR:-$root} # sbatch runs a copy of the script
. "$root/launch/common.sh"
VENV=${VENV:-$root/.venv-gpu}
nodes=1
on_nodes() {
    "$@"
}
if [ -n "${SLURM_JOB_ID:-}" ]; then
    command -v srun >/dev/null || fail "srun is missing; run this where Slurm is installed, or unset SLURM_JOB_ID"
    nodes=${SLURM_JOB_NUM_NODES:-1}
    on_nodes() {
        srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 "$@"
    }
fi

drivers=$(on_nodes nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) && [ -n "$drivers" ] ||
    fail "nvidia-smi finds no GPU; run this where one and its driver are (in Slurm, ask for --gpus-per-node)"
oldest=$(echo "$drivers" | sort -n | head -n 1)
[ "${oldest%%.*}" -ge 580 ] || fail "the driver is $oldest; JAX's CUDA 13 needs 580 or later, install that"
environment gpu
on_nodes test -x "$VENV/bin/gemfilter" || fail "$VENV is not on every node; name a shared folder in VENV"
[ -z "${SLURM_JOB_ID:-}" ] || listen_at "${PORT:-$((61440 + SLURM_JOB_ID % 4096))}" on_nodes
[ $# -gt 0 ] || exit 0
export JAX_PLATFORMS=cuda,cpu # without the GPU an error, not a slow run
[ -n "${SLURM_JOB_ID:-}" ] || exec "$VENV/bin/gemfilter" "$@"
gpus=${GPUS:-$(($(echo "$drivers" | wc -l) / nodes))}
exec srun --nodes="$nodes" --ntasks=$((nodes * gpus)) --ntasks-per-node="$gpus" --gpu-bind=none --kill-on-bad-exit=1 \
    "$VENV/bin/gemfilter" "$@" --distributed
