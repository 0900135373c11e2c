"""docs/plans.md is what plan_tables.py makes of the plans."""

import json
import pathlib
import runpy

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "plan_tables.py"


def test_the_page_is_that_of_the_plans():
    script = runpy.run_path(str(SCRIPT))
    assert script["PAGE"].read_text() == script["_page"]()


def test_a_row_has_the_units_of_its_columns():
    script = runpy.run_path(str(SCRIPT))
    plan = json.loads((script["PLANS"] / "llama-3.1-8b_32768_v5e_2x4.json").read_text())
    row = dict(zip(script["COLUMNS"], script["_row"](plan), strict=True))
    stages = plan["stages"]
    assert (row["chips"], row["tokens"]) == ("v5e 2x4", "32,768")
    # 8.03e9 parameters of two bytes on eight chips.
    assert float(row["weights GB"]) == round(stages["filter"]["memory"]["weights"] / 1e9, 2) == 2.01
    # Half of the layers read every token: two FLOPs for each of 218e6 parameters of a layer, on one of eight chips.
    least = 2 * 32768 * 16 * 218e6 / 8 / 1e12
    assert least < float(row["TFLOP"]) < 1.2 * least
    of_full = sum(one["seconds"]["total"] for one in plan["full_attention"].values())
    assert float(row["full attention s"]) == round(of_full, 3)
