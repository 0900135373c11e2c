# shellcheck shell=sh disable=SC2154
# What the launchers share. Their root is the checkout.

fail() {
    echo "$(basename "$0"): $1" >&2
    exit 2
}

# Make the environment in $VENV with the default model and the extra $1, unless it is newer than pyproject.toml.
environment() {
    if [ -n "$(find "$VENV/.ready" -newer "$root/pyproject.toml" 2>/dev/null)" ]; then
        return
    fi
    python=${PYTHON:-$(sh "$root/find_python.sh")}
    "${python:-false}" -c "import ensurepip, venv" 2>/dev/null || fail "no Python 3.11, 3.12 or 3.13 with venv found;\
 install one (Ubuntu: sudo apt-get install python3.12-venv, before 24.04 python3.11-venv) or name one in PYTHON"
    {
        echo "Making $VENV with $("$python" --version); the first time takes a few minutes"
        "$python" -m venv "$VENV"
        "$VENV/bin/python" -m pip install --upgrade "pip>=24"
        "$VENV/bin/python" -m pip install --editable "${root}[$1]"
        "$VENV/bin/gemfilter" fetch smollm2
        touch "$VENV/.ready"
    } >&2
}

# Have JAX's first process listen at port $1, free on this machine; what follows $1 runs the check on others.
listen_at() {
    port=$1
    shift
    "$@" "$VENV/bin/python" -c "import socket; socket.create_server(('', $port))" 2>/dev/null ||
        fail "port $port is in use; name another in PORT"
    export JAX_COORDINATOR_PORT="$port"
}
