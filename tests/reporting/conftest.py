"""A fixture that tests of plots share."""

import pytest

from gemfilter_jax.reporting import plots


@pytest.fixture
def figure(monkeypatch):
    """Draws a plot and gives its figure; the file is written too."""
    drawn = []
    write = plots._write
    monkeypatch.setattr(plots, "_write", lambda made, path: (drawn.append(made), write(made, path)))
    return drawn
