"""What a run tells at its end."""

import pytest

from gemfilter_jax.reporting import terminal
from gemfilter_jax.results import KeptText


def _closing(recall: float | None, kept: int = 2) -> list[str]:
    text = KeptText("a b c d", 4, tuple(range(kept)), ((0, 3),), recall)
    return terminal.closing_lines(text, "layer 1 of 2 picked", {"filter": 0.126}).split("\n")


@pytest.mark.parametrize(
    ("recall", "kept", "told"),
    [(None, 4, ""), (0.754, 2, ", recall about 0.75"), (0.5, 2, ", recall about 0.50")],
)
def test_recall_is_told_where_it_is_known(recall, kept, told):
    first, second = _closing(recall, kept)
    assert first == f"read 4 tokens, kept {kept} (ratio {kept / 4:.4f}), layer 1 of 2 picked{told}"
    assert second == "filter 0.13 s"


def test_a_low_estimate_warns():
    assert _closing(0.49)[2:] == ["warning: the answer is probably not in what was kept; keep more, see --keep"]
