"""Seconds per stage, with compilation counted separately."""

import contextlib
import time
from collections.abc import Iterator

import jax

COMPILE = "compile"
_compile_seconds = 0.0


def _count(event: str, duration_secs: float, **_: str | int) -> None:
    global _compile_seconds
    if event.startswith("/jax/core/compile/"):
        _compile_seconds += duration_secs


jax.monitoring.register_event_duration_secs_listener(_count)


class Stopwatch:
    """Collects `timings`: seconds by stage name without compilation, and "compile" for compilation in all stages."""

    def __init__(self) -> None:
        self.timings: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block; the block itself must wait until its arrays are ready."""
        compiled, started = _compile_seconds, time.perf_counter()
        yield
        elapsed = time.perf_counter() - started
        compiling = min(_compile_seconds - compiled, elapsed)  # a program traced inside another is counted twice
        self.timings[name] = self.timings.get(name, 0.0) + elapsed - compiling
        self.timings[COMPILE] = self.timings.get(COMPILE, 0.0) + compiling
