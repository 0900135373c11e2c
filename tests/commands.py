"""`gemfilter` as a process of its own, and what a mistake looks like."""

import subprocess
import sys


def gemfilter(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "gemfilter_jax.cli.main", *arguments], input=stdin, capture_output=True, timeout=120
    )


def assert_mistake(result: subprocess.CompletedProcess, *said: str) -> None:
    message = result.stderr.decode()
    assert result.returncode == 2, message
    assert result.stdout == b""
    assert len(message.strip().splitlines()) == 1, message
    assert "Traceback" not in message
    for words in said:
        assert words in message
