import math
from typing import Any

import pytest
from sample_run import data_of

from experiment.results.charts import (
    COLORS,
    INK,
    Charts,
    DotChart,
    Dots,
    Line,
    Panel,
    Plot,
    charts_block,
)
from experiment.results.curves import Curve


def block(*lines: Line, **panel: Any) -> Charts:
    (found,) = charts_block([Plot("loss", [Panel("loss", lines, **panel)])])
    return found


def test_lines_become_data() -> None:
    """Catches missing points, a moving average of the thinned values, and lines that cannot be told apart."""
    steps = list(range(1, 41))
    noisy = Line("training", Curve.of(steps, [1.0 + step % 2 for step in steps]), smoothed=True, color=INK)
    sparse = Line("wiki", Curve.of([1, 2, 3], [1.0, None, 1 / 3]), marked=True, run=1)
    many = [Line(f"run {number}", Curve.of([1, 2], [1.0, 2.0])) for number in range(len(COLORS))]
    found = block(noisy, sparse, *many, percent=True)
    training, wiki, *others = data_of(found)["charts"][0]["lines"]
    assert training["color"] == "var(--ink)"
    assert training["average"]["x"] == steps
    assert all(math.isclose(value, 1.5, abs_tol=0.2) for value in training["average"]["y"][5:35])
    assert (wiki["x"], wiki["y"], wiki["run"], wiki["average"]) == ([1, 3], [1.0, 0.333333], 1, None)
    looks = [(line["color"], line["dash"]) for line in (wiki, *others)]
    assert len(set(looks)) == len(looks)
    assert data_of(found)["charts"][0]["percent"]


@pytest.mark.parametrize("line", [Line("loss", Curve()), Line("loss", Curve.of([1], [1.0]))])
def test_a_chart_needs_one_point(line: Line) -> None:
    """Catches an empty chart, and a single log event that is not shown."""
    blocks = charts_block([Plot("loss", [Panel("loss", [line])])])
    assert len(blocks) == len(line.curve)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.81, 0.93], [0.8, 0.85, 0.9, 0.95]),
        ([0.8], [0.8, 1.0]),
        ([-3.0, 41.0], [-20.0, 0.0, 20.0, 40.0, 60.0]),
        ([0.0], [0.0, 0.25]),
        ([0.7000000000000001, 0.6999999999999998], [0.6, 0.8]),
        ([1e-9, 3e-9], [1e-9, 1.5e-9, 2e-9, 2.5e-9, 3e-9]),
    ],
)
def test_dots_are_within_their_axis(values: list[float], ticks: list[float]) -> None:
    """Catches dots beyond the axis, ticks that are not round, and one value, zero or equal means without a range."""
    chart = DotChart("score", [Dots("a", values, values[0])])
    assert chart.ticks == pytest.approx(ticks)
    assert chart.place(chart.ticks[0]) == 0.0
    assert chart.place(chart.ticks[-1]) == 100.0
    assert all(0.0 <= chart.place(value) <= 100.0 for value in values)
    assert chart.ticks is chart.ticks, "each dot would read all rows: quadratic in a sweep's points"


def test_the_axis_has_room_for_intervals() -> None:
    """Catches intervals that end beyond the axis."""
    chart = DotChart("score", [Dots("a", [0.5], 0.5, (0.1, 0.9)), Dots("b", [0.4], 0.4)])
    assert chart.ticks[0] <= 0.1
    assert chart.ticks[-1] >= 0.9
