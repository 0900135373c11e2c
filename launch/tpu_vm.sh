#!/bin/sh
# Runs gemfilter on this TPU VM, in an environment that it makes at the first run.
set -eu

usage() {
    cat <<'USAGE'
usage: launch/tpu_vm.sh [COMMAND [FLAG]...]

Runs `gemfilter COMMAND FLAG...` on the TPU of this machine, such as
  launch/tpu_vm.sh generate --prompt_file=book.txt --question="Who is the narrator?"
Without a command it only makes the environment. All workers of a pod slice: launch/tpu_pod.sh.

VENV         the environment (default: .venv-tpu in the checkout)
PYTHON       what makes it, a Python 3.11, 3.12 or 3.13 with venv (default: the best that is found)
PORT         for --distributed, where the first process listens (default: JAX's choice)
TPU_DEVICES  the TPU's device files (default: /dev/accel[0-9]* /dev/vfio/[0-9]*)
USAGE
}

case ${1:-} in
-h | --help)
    usage
    exit 0
    ;;
esac
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/launch/common.sh"
VENV=${VENV:-$root/.venv-tpu}

# shellcheck disable=SC2086 # patterns
ls -d ${TPU_DEVICES:-/dev/accel[0-9]* /dev/vfio/[0-9]*} >/dev/null 2>&1 ||
    fail "no TPU here; run this on a TPU VM (gcloud compute tpus tpu-vm create ... makes one, ssh leads to it)"
environment tpu
[ -z "${PORT:-}" ] || listen_at "$PORT"
[ $# -gt 0 ] || exit 0
export JAX_PLATFORMS=tpu,cpu # without the TPU an error, not a slow run
exec "$VENV/bin/gemfilter" "$@"
