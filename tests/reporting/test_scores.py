"""Tables and plots of scores: the numbers in their cells."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals.result_file import Line, ResultFile
from gemfilter_jax.reporting import plots, score_tables, terminal

HEADING = {"title": "Hidden facts", "parts": "depth", "model": "m", "main_score": "right", "answer": True}
DEPTHS = ("0 %", "100 %")


def line(method, keep, length, number, right, **changes) -> Line:
    scores = {} if right is None else {"right": right, "kept": 1.0}
    fields = {
        "length": length, "number": number, "method": method, "keep": keep, "name": "n", "digest": "",
        "group": DEPTHS[number % 2], "depth": 0.5, "tokens": 98, "question": "?", "expected": (), "answer": "so",
        "scores": scores, "prompt_tokens": 1, "seconds": {"filter": 1.0, "prefill": 0.5},
        "error": "too long" if right is None else None,
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
    """Those of the first table."""
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in text.split("\n\n")[1].splitlines()]


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


def test_unanswered_examples_are_told_with_their_reason():
    lines = (*RESULTS.lines[:1], line("full", "all", 1_000, 9, None, error="keep is 3\nor *so*"))
    made = ResultFile(HEADING, lines, ("a.jsonl is not finished: it has 2 of 3 results",))
    (row,) = cells(score_tables.markdown(made))[2:]
    assert row[3:6] == ["2", "1", "1.00 (.21-1.00) of 1"]
    assert score_tables.markdown(made).endswith(
        "\n\n- a.jsonl is not finished: it has 2 of 3 results"
        "\n- full: 1 unanswered; the first: keep is 3\\\\nor \\*so\\*"
    )
    assert score_tables.as_json(made)["remarks"] == score_tables.remarks(made)


def test_empty_answers_are_told():
    lines = [line("full", "all", 1_000, number, 0.0, answer=answer) for number, answer in enumerate(("", "so", " \n"))]
    assert score_tables.remarks(ResultFile(HEADING, tuple(lines))) == ["full: 2 of the answers are empty"]
    only_kept = [dataclasses.replace(one, seconds={"filter": 1.0}) for one in lines]
    assert score_tables.remarks(ResultFile(HEADING, tuple(only_kept))) == []


def test_an_average_needs_a_score_of_every_part():
    lines = [line("full", "all", 1_000, number, right) for number, right in ((0, 1.0), (1, None))]
    assert cells(score_tables.markdown(ResultFile(HEADING, tuple(lines)), by_group=True))[-1][6:8] == ["-", "-"]


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


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a|b", r"a\|b"),
        ("a\nb", r"a\\nb"),
        ("\x1b[31mred", r"\\x1b\[31mred"),
        ("*a* `b` <i>", r"\*a\* \`b\` \<i>"),
        ("first_last < 3", "first_last < 3"),
    ],
)
def test_names_are_no_markup_in_markdown(name, shown):
    results = ResultFile(HEADING, (line("full", "all", 1_000, 0, 1.0, group=name),))
    made = score_tables.markdown(results, by_group=True)
    assert f"| {shown} |" in made.splitlines()[4]
    assert "\x1b" not in made
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(score_tables.rich_table(results, by_group=True))
    assert "\x1b[31m" not in console.export_text()


def test_json_has_the_numbers():
    made = json.loads(json.dumps(score_tables.as_json(RESULTS, score_tables.comparisons(RESULTS, "bm25", "right"))))
    assert made["run"] == HEADING
    assert made["rows"][1]["scores"]["right"]["interval"] == pytest.approx([0.3006, 0.9544], abs=5e-5)
    assert made["rows"][1]["scores"]["right"]["value"] == 0.75
    assert made["compared"][0]["better"] == 2


def test_running_scores_are_lines_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN", 0.0)
    lines = list(RESULTS.lines[:4])
    with score_tables.running(Console(force_terminal=False, width=200), lines, 6, "right") as report:
        for number, right in ((0, 1.0), (1, 0.0)):
            lines.append(line("default", 512, 1_000, number, right))
            report(lines[-1])
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        "5 of 6, about a minute left or less; right: full 0.75, default@512 1.00",
        "6 of 6, about a minute left or less; right: full 0.75, default@512 0.50",
    ]


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
    assert figure[0].get_supylabel() == "depth"
    assert [bool(axes.patch.get_hatch()) for axes in panels] == [True, False, False, False]
    assert "hatched: not asked, or no answer" in figure[0].get_suptitle()


def test_a_row_of_panels_for_each_method_and_means_of_examples(figure, tmp_path):
    """The second method has one budget, and its examples are not spread evenly over the parts."""
    shown = ResultFile(
        HEADING | {"model": "cost$\\foo$"},
        (
            *(line("default", keep, 1_000, 0, 1.0) for keep in (128, 256)),
            *(line("bm25", 128, 1_000, number, right) for number, right in ((0, 1.0), (2, 1.0), (4, 1.0), (1, 0.0))),
        ),
    )
    plots.heat_maps(shown, "right", str(tmp_path / "map.png"))
    default, wider, bm25 = (axes for axes in figure[0].axes if axes.images)
    assert bm25.get_title() == "bm25@128: 0.750"
    places = [axes.get_subplotspec() for axes in (default, wider, bm25)]
    assert [(place.rowspan.start, place.colspan.start) for place in places] == [(0, 0), (0, 1), (1, 0)]
    assert "cost$\\foo$" in figure[0].get_suptitle()


def test_scores_by_budget(figure, tmp_path):
    plots.by_budget(RESULTS, "right", str(tmp_path / "budgets.svg"))
    assert b"<svg" in (tmp_path / "budgets.svg").read_bytes()
    first, second = figure[0].axes
    assert [axes.get_title() for axes in (first, second)] == ["1,000 tokens", "2,000 tokens"]
    assert [label.get_text() for label in first.get_xticklabels()] == ["512", "1,024"]
    heights = {tuple(map(float, one.get_ydata())) for one in first.lines}
    assert {(0.75, 1.0), (0.25,), (0.75, 0.75)} <= heights
    default, bm25 = first.containers
    assert [float(one.get_xdata()[0]) for one in (default.lines[0], bm25.lines[0])] == pytest.approx([0, 0.06])
    (bars,) = bm25.lines[2]
    assert bars.get_segments()[0][:, 1] == pytest.approx([0.0456, 0.6994], abs=5e-5)  # Wilson's, of 1 in 4
    assert "(4 examples, 95 % intervals)" in figure[0].get_suptitle()
    assert {text.get_text() for text in figure[0].legends[0].get_texts()} == {"full", "default", "bm25"}
