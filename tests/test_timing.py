"""Seconds of stages have no compilation in them."""

import jax
import pytest

from gemfilter_jax import timing
from gemfilter_jax.timing import COMPILE, Stopwatch


def test_compilation_is_counted_apart(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    watch = Stopwatch()
    for seconds, compiling in ((5.0, 2.0), (1.0, 0.0), (3.0, 4.0)):
        with watch.stage("filter"):
            clock[0] += seconds
            jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", compiling)
            jax.monitoring.record_event_duration_secs("/jax/compilation_cache/compile_time_saved_sec", 9.0)
    # Programs that are traced inside others are counted twice, so that compilation may seem longer than the stage.
    assert watch.timings == pytest.approx({"filter": 3.0 + 1.0 + 0.0, COMPILE: 2.0 + 0.0 + 3.0})
