"""Ceilings of a device: the arithmetic of speeds, and that what is timed has ended."""

import pytest

from gemfilter_jax.planning import ceilings
from gemfilter_jax.planning.ceilings import Ceilings


def test_the_least_of_several_times_each_until_the_result_is_ready(monkeypatch):
    clock, costs, given = [0.0], iter([100.0, 5.0, 3.0, 4.0, 3.5, 9.0]), []

    class Pending:
        def block_until_ready(self):
            clock[0] += next(costs)
            return self

    monkeypatch.setattr(ceilings.time, "perf_counter", lambda: clock[0])
    assert ceilings._fastest(lambda x: given.append(x) or Pending(), "x") == 3
    assert given == ["x"] * 6


def test_speeds_are_work_by_time(monkeypatch):
    timed = []

    def half_a_second(program, x, *, in_place=False):
        timed.append((x.dtype.name, x.shape, in_place))
        return 0.5

    monkeypatch.setattr(ceilings, "_fastest", half_a_second)
    monkeypatch.setattr(ceilings, "_SIDE_ON_CPU", 8)
    monkeypatch.setattr(ceilings, "_BYTES_ON_CPU", 4096)
    # 8^3 products and as many sums; 4096 bytes are read and as many written.
    assert ceilings.measure("bfloat16") == Ceilings(2 * 2 * 8**3, 2 * 2 * 8**3, 2 * 2 * 4096)
    assert timed == [("bfloat16", (8, 8), False), ("int8", (8, 8), False), ("float32", (1024,), True)]


def test_least_time_of_products_of_both_kinds():
    assert Ceilings(10, 40, 1).seconds(100, 80) == pytest.approx(20 / 10 + 80 / 40)
