"""Fixtures that several test files share."""

from collections.abc import Iterator

import jax
import pytest

from gemfilter_jax import pipeline
from gemfilter_jax.pipeline import Pipeline


@pytest.fixture(scope="session")
def smollm2() -> Pipeline:
    """The default model in float32, loaded once."""
    return pipeline.load("smollm2", dtype="float32")


@pytest.fixture(scope="module", autouse=True)
def _programs_are_released() -> Iterator[None]:
    """Each compiled program takes several of the 65,530 memory maps that Linux gives a process; beyond, XLA crashes."""
    yield
    jax.clear_caches()
