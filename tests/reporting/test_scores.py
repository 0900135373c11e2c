"""Tables and plots of scores: the numbers in their cells."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals.result_file import Line, ResultFile
from gemfilter_jax.reporting import plots, score_tables

HEADING = {"title": "Hidden facts", "model": "m", "main_score": "right"}
DEPTHS = ("0 %", "100 %")


def line(method, keep, length, number, right, **changes) -> Line:
    scores = {} if right is None else {"right": right, "kept": 1.0}
    fields = {
        "length": length, "number": number, "method": method, "keep": keep, "name": "n", "group": DEPTHS[number % 2],
        "depth": 0.5, "tokens": 98, "question": "?", "expected": (), "answer": "", "scores": scores,
        "prompt_tokens": 1, "seconds": {"filter": 1.5}, "error": "too long" if right is None else None,
    }  # fmt: skip
    return Line(**fields | changes)


RESULTS = ResultFile(
    HEADING,
    tuple(
        line(method, keep, length, number, right)
        for length in (1_000, 2_000)
        for method, keep, rights in (
            ("full", "all", (1.0, 0.0, 1.0, 1.0) if length == 1_000 else (None,) * 4),
            ("default", 512, (1.0, 1.0, 1.0, 0.0)),
            ("default", 1_024, (1.0, 1.0, 1.0, 1.0)),
            ("bm25", 512, (0.0, 0.0, 1.0, 0.0)),
        )
        for number, right in enumerate(rights)
    ),
)


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines()]


def test_markdown():
    headings, _, *rows = cells(score_tables.markdown(RESULTS))
    scores = ["right (95 %)", "kept (95 %)"]
    assert headings == ["method", "keep", "text tokens", "examples", "unanswered", *scores, "seconds"]
    assert rows[:3] == [
        ["full", "all", "1,000", "4", "0", "0.75 (.30-.95)", "1.00 (.51-1.00)", "1.5"],
        ["default", "512", "1,000", "4", "0", "0.75 (.30-.95)", "1.00 (.51-1.00)", "1.5"],
        ["default", "1,024", "1,000", "4", "0", "1.00 (.51-1.00)", "1.00 (.51-1.00)", "1.5"],
    ]
    assert rows[4] == ["full", "all", "2,000", "4", "4", "-", "-", "-"]


def test_parts_and_lengths_of_their_own():
    own = ResultFile(HEADING, tuple(line("full", "all", None, number, 1.0, tokens=97 + number) for number in range(3)))
    _, _, *rows = cells(score_tables.markdown(own, by_group=True))
    assert [row[:5] for row in rows] == [
        ["full", "all", "about 98", "0 %", "2"],
        ["full", "all", "about 98", "100 %", "1"],
        ["full", "all", "about 98", "average of the parts", "3"],
    ]


def test_parts_count_alike_in_their_average():
    rows = cells(score_tables.markdown(RESULTS, by_group=True))[2:]
    assert [row[3:7] for row in rows if row[:3] == ["default", "512", "1,000"]] == [
        ["0 %", "2", "0", "1.00 (.34-1.00)"],
        ["100 %", "2", "0", "0.50 (.09-.91)"],
        ["average of the parts", "4", "0", "0.75"],
    ]
    uneven = ResultFile(HEADING, tuple(line("full", "all", 1_000, n, float(n % 2)) for n in (0, 2, 4, 1)))
    assert cells(score_tables.markdown(uneven, by_group=True))[-1][5] == "0.50"


def test_a_score_that_some_examples_lack_is_told_with_its_count():
    lines = (*RESULTS.lines[:1], line("full", "all", 1_000, 9, 1.0, scores={"right": 1.0}))
    (row,) = cells(score_tables.markdown(ResultFile(HEADING, lines)))[2:]
    assert row[4:6] == ["1.00 (.34-1.00)", "1.00 (.21-1.00) of 1"]


@pytest.mark.parametrize(
    ("baseline", "pairs"),
    [
        ("bm25", {("default", 512, 1_000): (2, 0), ("default", 512, 2_000): (2, 0)}),
        ("full", {("default", 512, 1_000): (1, 1), ("default", 1_024, 1_000): (1, 0), ("bm25", 512, 1_000): (0, 2)}),
        ("default@1024", {("full", "all", 1_000): (0, 1), ("default", 512, 1_000): (0, 1), ("bm25", 512, 1_000): (0, 3),
                          ("default", 512, 2_000): (0, 1), ("bm25", 512, 2_000): (0, 3)}),
    ],
)  # fmt: skip
def test_comparisons_with_a_baseline(baseline, pairs):
    made = score_tables.comparisons(RESULTS, baseline, "right")
    assert {key: (one.better, one.worse) for key, one in made.items()} == pairs


def test_a_baseline_without_results_is_refused():
    for baseline in ("snapkv", "bm25@256"):
        with pytest.raises(
            UserError, match=f"--baseline={baseline}: the results are of full, default@512, default@1024"
        ):
            score_tables.comparisons(RESULTS, baseline, "right")
    alone = ResultFile(HEADING, tuple(one for one in RESULTS.lines if one.contestant != ("default", 512)))
    with pytest.raises(UserError, match="--baseline=bm25: no other method has scores at its budget"):
        score_tables.comparisons(alone, "bm25", "right")


def test_what_files_say_is_no_markup():
    hostile = ResultFile(HEADING | {"title": "[/data] [v2]"}, (line("full", "all", 1_000, 0, 1.0, group="[red]x"),))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(score_tables.rich_table(hostile, by_group=True))
    assert "[/data] [v2]" in console.export_text(clear=False)
    assert "[red]x" in console.export_text()


def test_json_has_the_numbers():
    made = json.loads(json.dumps(score_tables.as_json(RESULTS, score_tables.comparisons(RESULTS, "bm25", "right"))))
    assert made["run"] == HEADING
    assert made["rows"][1]["scores"]["right"]["value"] == 0.75
    assert made["compared"][0]["better"] == 2


def test_running_scores_are_lines_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(score_tables, "_SECONDS_BETWEEN", 0.0)
    lines = list(RESULTS.lines[:4])
    with score_tables.running(Console(force_terminal=False, width=200), lines, 6, "right") as report:
        for number, right in ((0, 1.0), (1, 0.0)):
            lines.append(line("default", 512, 1_000, number, right))
            report(lines[-1])
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        "5 of 6, 0 minutes left; right: full 0.75, default@512 1.00",
        "6 of 6, 0 minutes left; right: full 0.75, default@512 0.50",
    ]


@pytest.fixture
def figure(monkeypatch):
    """Draws a plot and gives its figure; the file is written too."""
    drawn = []
    write = plots._write
    monkeypatch.setattr(plots, "_write", lambda made, path: (drawn.append(made), write(made, path)))
    return drawn


def test_heat_maps(figure, tmp_path):
    plots.heat_maps(RESULTS, "right", str(tmp_path / "map.png"))
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    panels = [axes for axes in figure[0].axes if axes.images]
    assert [axes.get_title() for axes in panels] == [
        "full: 0.750", "default@512: 0.750", "default@1024: 1.000", "bm25@512: 0.250"
    ]  # fmt: skip
    grid = np.asarray(panels[0].images[0].get_array().filled(np.nan))
    np.testing.assert_array_equal(grid, [[1.0, np.nan], [0.5, np.nan]])
    np.testing.assert_array_equal(panels[3].images[0].get_array(), [[0.5, 0.5], [0.0, 0.0]])
    for below in panels[2:]:  # nothing is drawn under these
        assert [label.get_text() for label in below.get_xticklabels()] == ["1,000", "2,000"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == list(DEPTHS)


def test_scores_by_budget(figure, tmp_path):
    plots.by_budget(RESULTS, "right", str(tmp_path / "budgets.svg"))
    assert b"<svg" in (tmp_path / "budgets.svg").read_bytes()
    first, second = figure[0].axes
    assert [axes.get_title() for axes in (first, second)] == ["1,000 tokens", "2,000 tokens"]
    assert [label.get_text() for label in first.get_xticklabels()] == ["512", "1,024"]
    heights = {tuple(map(float, one.get_ydata())) for one in first.lines}
    assert {(0.75, 1.0), (0.25,), (0.75, 0.75)} <= heights
    assert {text.get_text() for text in figure[0].legends[0].get_texts()} == {"full", "default", "bm25"}
