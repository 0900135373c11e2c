#!/bin/sh
# Runs gemfilter on all workers of a TPU pod slice, from any machine that has gcloud.
set -eu

usage() {
    cat <<'USAGE'
usage: TPU_NAME=NAME [VARIABLE=VALUE...] launch/tpu_pod.sh COMMAND [FLAG]...

Copies the last commit of this checkout to every worker of the slice, makes an environment there at the first run, and
runs `gemfilter COMMAND FLAG... --distributed` in the folder REPO of all of them, such as
  TPU_NAME=my-slice ZONE=us-east5-b FILES=book.txt launch/tpu_pod.sh generate --prompt_file=book.txt --question="Who?"
The answer is printed here; files that a command writes lie on the first worker. The run ends on all workers when this
script ends, however it ends. ssh-add ~/.ssh/google_compute_engine may have to be run first.

TPU_NAME     the slice
ZONE         where it is (default: gcloud's compute/zone)
PROJECT      whose it is (default: gcloud's project)
FILES        what else to copy into REPO, names with spaces between (default: nothing)
REPO         the folder on the workers, from the home folder (default: gemfilter_jax)
VENV         the environment on the workers, from REPO (default: .venv-tpu)
PYTHON       what makes it there, a Python 3.11, 3.12 or 3.13 with venv (default: the best that is found)
PORT         where the first worker listens for the others (default: 8482)
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

[ $# -gt 0 ] || fail "no command; give one, such as generate, or --help"
command -v gcloud >/dev/null || fail "gcloud is missing; install the Google Cloud CLI (https://cloud.google.com/sdk)"
[ -n "${TPU_NAME:-}" ] || fail "no slice; name it in TPU_NAME (gcloud compute tpus tpu-vm list --zone=ZONE tells them)"
ZONE=${ZONE:-$(gcloud config get-value compute/zone 2>/dev/null)}
[ -n "$ZONE" ] || fail "no zone; name it in ZONE, or run: gcloud config set compute/zone ZONE"
git -C "$root" rev-parse --quiet --verify HEAD >/dev/null 2>&1 || fail "$root is not a git checkout; clone the repository"

tpu() {
    gcloud compute tpus tpu-vm "$@" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"} --quiet
}

state=$(tpu describe "$TPU_NAME" --format="value(state)") || fail "TPU_NAME=$TPU_NAME cannot be reached; see above"
[ "$state" = READY ] || fail "TPU_NAME=$TPU_NAME is $state, not READY; start it or make another"

# Workers run commands by while_connected.sh, and their standard input lasts as long as descriptor 3 here.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exec 3>&-; wait; exit 130' INT
trap 'exec 3>&-; wait; exit 143' HUP TERM
mkfifo "$folder/connection"
exec 3<>"$folder/connection"

on_workers() {
    {
        exec 3>&-
        tpu ssh "$TPU_NAME" --worker=all --command="$1"
    } <"$folder/connection" &
    wait $!
}

quoted() {
    for word; do
        printf " %s" "$(printf "%s\n" "$word" | sed "s/'/'\\\\''/g; 1s/^/'/; \$s/\$/'/")"
    done
}

git -C "$root" archive --format=tar.gz --output="$folder/gemfilter_jax.tar.gz" HEAD
tpu scp "$folder/gemfilter_jax.tar.gz" "$TPU_NAME:" --worker=all >&2
REPO=${REPO:-gemfilter_jax}
repo=$(quoted "$REPO")
run="sh launch/while_connected.sh env$(quoted "PORT=${PORT:-8482}" ${VENV:+"VENV=$VENV"} ${PYTHON:+"PYTHON=$PYTHON"})\
 sh launch/tpu_vm.sh"
on_workers "mkdir -p $repo && tar -xzf gemfilter_jax.tar.gz -C $repo && cd $repo && $run" ||
    fail "not every worker could be made ready; see above"
# shellcheck disable=SC2086 # several names
[ -z "${FILES:-}" ] || tpu scp $FILES "$TPU_NAME:$REPO/" --worker=all --recurse >&2
on_workers "cd $repo && $run$(quoted "$@" --distributed)"
