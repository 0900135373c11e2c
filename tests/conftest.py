"""Fixtures that several test files share."""

import pytest

from gemfilter_jax import pipeline
from gemfilter_jax.pipeline import Pipeline


@pytest.fixture(scope="session")
def smollm2() -> Pipeline:
    """The default model in float32, loaded once."""
    return pipeline.load("smollm2", dtype="float32")
