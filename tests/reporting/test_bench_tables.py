"""Tables and the plot of time and memory: which numbers they show, and how wide they are."""

import io
import itertools

import pytest
from rich.console import Console

from gemfilter_jax.evals import bench
from gemfilter_jax.evals.bench import Row, Work
from gemfilter_jax.reporting import bench_tables, plots

METHODS = (("full", "all", None), ("default", 1024, "tri_shape"), ("default", 1024, "dense"), ("snapkv", 1024, None))
LENGTHS, BATCHES = (8_192, 130_000), (1, 4)


def row(method, keep, attention, length, batch) -> Row:
    """Of a method that is the faster and the smaller the later it is listed."""
    slower = len(METHODS) - METHODS.index((method, keep, attention))
    median = {
        "tokenize_seconds": 0.5, "prefill_seconds": 1.25, "decode_seconds": 0.5, "first_token_seconds": 234.5,
        "decode_step_seconds": 0.1234, "total_seconds": batch * length * slower / 1e3, "tokens_per_second": 9.0,
        "full_to_this_ratio": 12.345,
    }  # fmt: skip
    if attention:
        median["filter_seconds"] = 123.45
    of_program = batch * length * slower * 10**4
    work = Work(None, None, None, None, 1, largest_program_bytes=of_program)
    kept = length if keep == "all" else keep
    return Row(
        method, keep, attention, batch, length, kept, 1.0, (median,), median, median, median, 2 * of_program, work, {}
    )


ROWS = [row(*method, length, batch) for length, batch, method in itertools.product(LENGTHS, BATCHES, METHODS)]


def printed(rows, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    for table in bench_tables.tables(rows, "a [model]"):
        console.print(table)
    return console.file.getvalue().splitlines()


def test_a_hundred_columns_show_every_number_whole():
    lines = printed(ROWS, 100)
    assert lines[0].strip() == "a [model], batch 1"
    assert max(map(len, lines)) <= 100
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert cells[0][1:3] == ["8,192", "8,192"]
    (of_default,) = (line for line in cells if line[0].startswith("default") and line[1:3] == ["130,000", "1,024"]
                     and line[7] == "390.00")  # fmt: skip
    assert of_default[3:] == ["123.45", "1.25", "123.4", "234.50", "390.00", "12.35", f"{of_memory(ROWS[9]):.2f}"]
    assert {line[3] for line in cells if line[0] in ("full", "snapkv")} == {"-"}


def of_memory(one: Row) -> float:
    return one.memory / 1e9


def test_a_single_attention_and_batch_are_not_told():
    alone = [one for one in ROWS if one.batch == 1 and one.filter_attention != "dense"]
    text = "\n".join(printed(alone, 1_000))
    assert "batch" not in text
    assert "tri_shape" not in text
    assert max(map(len, text.splitlines()[1:])) < 100


@pytest.mark.parametrize("apart", [True, False])
def test_the_plot_has_a_line_for_each_method_attention_and_batch(figure, tmp_path, monkeypatch, apart):
    monkeypatch.setattr(bench, "peaks_are_apart", lambda: apart)
    plots.time_and_memory(ROWS, "a $model$", str(tmp_path / "bench.png"), memory=bench.memory_shown())
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    seconds, memory = figure[0].axes
    names = ["full", "default@1024 tri_shape", "default@1024 dense", "snapkv@1024"]
    named = [f"{name}, batch {batch}" for name in names for batch in BATCHES]
    assert [text.get_text() for text in figure[0].legends[0].get_texts()] == named
    for index, (slower, batch) in enumerate(itertools.product((4, 3, 2, 1), BATCHES)):
        scaled = [batch * length * slower for length in LENGTHS]
        line, of_bytes = seconds.lines[index], memory.lines[index]
        assert [float(x) for x in line.get_xdata()] == [float(x) for x in of_bytes.get_xdata()] == list(LENGTHS)
        assert list(map(float, line.get_ydata())) == pytest.approx([one / 1e3 for one in scaled])
        assert list(map(float, of_bytes.get_ydata())) == pytest.approx([one * (1 + apart) / 1e5 for one in scaled])
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in seconds.lines}
    assert len(looks) == len(named)
    assert seconds.get_ylabel() == "seconds of all stages"
    assert memory.get_ylabel() == ("peak memory, GB" if apart else "memory of the largest program, GB")


def test_lines_of_one_attention_and_batch_are_named_by_method_and_budget(figure, tmp_path):
    alone = [one for one in ROWS if one.batch == 1 and one.filter_attention != "dense"]
    plots.time_and_memory(alone, "a model", str(tmp_path / "bench.svg"), memory="peak memory")
    names = [text.get_text() for text in figure[0].legends[0].get_texts()]
    assert names == ["full", "default@1024", "snapkv@1024"]
