import math
import random
from typing import Any

import numpy as np
import pytest

from experiment.results.charts import (
    COLORS,
    INK,
    MAX_POINTS,
    Charts,
    DotChart,
    Dots,
    Line,
    Panel,
    Plot,
    charts_block,
    moving_average,
    thin,
    x_axis,
)


def block(*lines: Line, **panel: Any) -> Charts:
    (found,) = charts_block([Plot("loss", [("Loss", Panel("loss", lines, **panel))])])
    return found


def test_long_curves_keep_their_outliers() -> None:
    """Catches a page of gigabytes after weeks of training, and a spike that downsampling hides."""
    draw = random.Random(0)
    values = np.array([draw.random() for _ in range(100_003)])
    values[[17, 50_001, 99_999]] = [9.0, -7.0, 8.0]
    kept = thin(values)
    assert len(kept) <= MAX_POINTS
    assert {0, 17, 50_001, 99_999, 100_002} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    assert thin(values[:MAX_POINTS]).tolist() == list(range(MAX_POINTS))


def test_time_is_that_of_training() -> None:
    """Catches hours that count evaluations or nulls, and an axis that does not begin at 0."""
    events = [
        {"step": 0, "eval/wiki/loss": 9.0},
        {"step": 10, "tokens": 1000, "tokens_per_second": 100.0},
        {"step": 20, "tokens": 3000, "tokens_per_second": 200.0},
        {"step": 20, "tokens": 3000, "eval/wiki/loss": 8.0},
        {"step": 30, "tokens": 4000, "tokens_per_second": None},
        {"step": 40, "tokens": 5000, "tokens_per_second": 400.0},
    ]
    axis = x_axis(events)
    assert axis["step"] == [0, 10, 20, 40]
    assert axis["tokens"] == [0, 1000, 3000, 5000]
    assert axis["seconds"] == [0, 10, 20, 25]
    assert x_axis(events[:1]) == {"step": [], "tokens": [], "seconds": []}
    many = [{"step": step, "tokens": step, "tokens_per_second": 1.0} for step in range(1, 5 * MAX_POINTS)]
    assert len(x_axis(many)["step"]) == MAX_POINTS + 1


def test_lines_become_data() -> None:
    """Catches missing points, a moving average of the thinned values, and lines that cannot be told apart."""
    steps = list(range(1, 41))
    noisy = Line("training", steps, [1.0 + step % 2 for step in steps], smoothed=True, color=INK)
    sparse = Line("wiki", [1, 2, 3], [1.0, None, 1 / 3], marked=True, run=1)
    many = [Line(f"run {number}", [1, 2], [1.0, 2.0]) for number in range(len(COLORS))]
    found = block(noisy, sparse, *many, percent=True)
    training, wiki, *others = found.data["charts"][0]["lines"]
    assert training["color"] == "var(--ink)"
    assert len(training["average"]) == 40
    assert all(math.isclose(value, 1.5, abs_tol=0.2) for value in training["average"][5:35])
    assert (wiki["x"], wiki["y"], wiki["run"], wiki["average"]) == ([1, 3], [1.0, 0.333333], 1, None)
    looks = [(line["color"], line["dash"]) for line in (wiki, *others)]
    assert len(set(looks)) == len(looks)
    assert found.data["charts"][0]["percent"]


@pytest.mark.parametrize("line", [Line("loss", [], []), Line("loss", [1], [1.0])])
def test_a_chart_needs_one_point(line: Line) -> None:
    """Catches an empty chart, and a single log event that is not shown."""
    blocks = charts_block([Plot("loss", [("Loss", Panel("loss", [line]))])])
    assert len(blocks) == len(line.x)


def test_the_moving_average_follows_a_start_and_smooths_an_end() -> None:
    """Catches a curve that lags behind a falling loss, or bends towards the last value at its end."""
    line = [float(value) for value in range(30)]
    assert moving_average(line, 4)[:26] == pytest.approx(line[:26])
    assert moving_average([0.0, 3.0, 0.0, 3.0, 0.0, 6.0], 1) == pytest.approx([0.0, 1.0, 2.0, 1.0, 3.0, 3.0])


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.81, 0.93], [0.8, 0.85, 0.9, 0.95]),
        ([0.8], [0.8, 1.0]),
        ([-3.0, 41.0], [-20.0, 0.0, 20.0, 40.0, 60.0]),
        ([0.0], [0.0, 0.25]),
        ([1e-9, 3e-9], [1e-9, 1.5e-9, 2e-9, 2.5e-9, 3e-9]),
    ],
)
def test_dots_are_within_their_axis(values: list[float], ticks: list[float]) -> None:
    """Catches dots beyond the axis, ticks that are not round, and one value or zero, which have no range."""
    chart = DotChart("score", [Dots("a", values, values[0])])
    assert chart.ticks == pytest.approx(ticks)
    assert chart.place(chart.ticks[0]) == 0.0
    assert chart.place(chart.ticks[-1]) == 100.0
    assert all(0.0 <= chart.place(value) <= 100.0 for value in values)


def test_the_axis_has_room_for_intervals() -> None:
    """Catches intervals that end beyond the axis."""
    chart = DotChart("score", [Dots("a", [0.5], 0.5, (0.1, 0.9)), Dots("b", [0.4], 0.4)])
    assert chart.ticks[0] <= 0.1
    assert chart.ticks[-1] >= 0.9
