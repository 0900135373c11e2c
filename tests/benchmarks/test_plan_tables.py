"""benchmarks/plan_tables.py: the committed page."""

import pathlib

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


def test_committed_page_is_of_the_committed_plans(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import plan_tables

    assert plan_tables.PAGE.read_text() == plan_tables._page()
