"""Charts of runs: what they show, and their data in a page, of bounded size however long the runs.

`page.js` draws them in pages, `plots` as PNG files.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from experiment.tracking.jsonl import Event

# Okabe & Ito (2008), "Color universal design": distinguishable with any kind of color vision.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
INK = "#1d2430"

MAX_POINTS = 2000  # of a curve
_DASHES = ("", "7 3", "2 3")  # for more lines than colors
_AXES = ("step", "tokens", "seconds")

Axis = Mapping[str, Sequence[float]]
"""Tokens and seconds of training at some steps of a run; empty where not known."""


@dataclass(frozen=True)
class Line:
    """One curve. Points whose y is None are left out.

    smoothed: draw a pale line behind its moving average, for noisy values. marked: show the points, for sparse values.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    smoothed: bool = False
    marked: bool = False
    dashed: bool = False
    color: str | None = None  # default: the next of COLORS
    run: int = 0  # which of the runs that a page shows it is of
    seed: str = ""  # tells lines of one label apart


@dataclass(frozen=True)
class Panel:
    """One set of axes with its curves."""

    y_label: str
    lines: Sequence[Line]
    scale: Literal["linear", "log"] = "linear"
    percent: bool = False  # y is a fraction
    from_zero: bool = False  # the y axis starts at 0


@dataclass(frozen=True)
class Plot:
    """Panels with titles: one chart each on a page, together one PNG."""

    name: str  # of the PNG
    panels: Sequence[tuple[str, Panel]]


@dataclass(frozen=True)
class Mark:
    """What happened at a step of the run."""

    kind: str  # restart, bad, stage or best
    step: int
    text: str


@dataclass(frozen=True)
class Charts:
    """Charts that share their x axis, a block of a page. axes: of the runs of the lines."""

    plots: Sequence[Plot]
    axes: Sequence[Axis] = ()
    marks: Sequence[Mark] = ()

    @property
    def titles(self) -> list[str]:
        return [title for plot in self.plots for title, _ in plot.panels]

    @property
    def data(self) -> dict[str, Any]:
        """As `page.js` describes; JSON."""
        shared = {"axes": list(self.axes) or [x_axis([])], "marks": [vars(mark) for mark in self.marks]}
        return {**shared, "charts": [_chart(panel) for plot in self.plots for _, panel in plot.panels]}


@dataclass(frozen=True)
class Dots:
    """A dot for each value, usually one per seed, and their mean, with its 95 % interval if it is known."""

    label: str
    values: Sequence[float]
    mean: float
    interval: Sequence[float] | None = None  # low, high


@dataclass(frozen=True)
class DotChart:
    """Rows of dots on one axis."""

    title: str
    rows: Sequence[Dots]

    @property
    def ticks(self) -> list[float]:
        """Round numbers, the first and last of which are the ends of the axis."""
        shown = [value for row in self.rows for value in (*row.values, row.mean, *(row.interval or ()))]
        low, high = min(shown), max(shown)
        least = (high - low or abs(high) or 1.0) / 4
        power = 10.0 ** math.floor(math.log10(least))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        return [float(f"{number * step:.9g}") for number in range(first, max(last, first + 1) + 1)]

    def place(self, value: float) -> float:
        """The position of a value on the axis, in percent of its length."""
        first, *_, last = self.ticks
        return round(100 * (value - first) / (last - first), 2)


@dataclass(frozen=True)
class DotCharts:
    """A block of a page: charts that belong together, and that are one PNG."""

    name: str  # of the PNG
    charts: Sequence[DotChart]


def charts_block(plots: Sequence[Plot], axes: Sequence[Axis] = (), marks: Sequence[Mark] = ()) -> list[Charts]:
    """The panels that have data, as one block; empty if none has."""
    filled = [
        Plot(plot.name, [found for found in plot.panels if any(line.x for line in found[1].lines)]) for plot in plots
    ]
    shown = [plot for plot in filled if plot.panels]
    return [Charts(shown, axes, marks)] if shown else []


def x_axis(events: Sequence[Event]) -> Axis:
    """Tokens and time of training by step. The time is that of the log events: evaluations and checkpoints are no
    part of it, nor is what was lost by a crash."""
    trained = [event for event in events if _number(event.get("tokens")) and _number(event.get("tokens_per_second"))]
    if not trained:
        return {name: [] for name in _AXES}
    tokens = np.array([event["tokens"] for event in trained], dtype=np.float64)
    speeds = np.array([event["tokens_per_second"] for event in trained], dtype=np.float64)
    taken = np.maximum(np.diff(tokens, prepend=0.0), 0.0)
    seconds = np.cumsum(np.divide(taken, speeds, out=np.zeros_like(taken), where=speeds > 0))
    kept = np.unique(np.linspace(0, len(trained) - 1, min(len(trained), MAX_POINTS)).round().astype(np.int64))
    steps = [trained[index]["step"] for index in kept]
    return {"step": [0, *steps], "tokens": [0, *tokens[kept].tolist()], "seconds": [0, *_rounded(seconds[kept])]}


def _chart(panel: Panel) -> dict[str, Any]:
    plain = [line for line in panel.lines if line.color is None]
    return {
        "lines": [
            _line(line, plain.index(line) if line.color is None else None)
            for line in panel.lines
            if any(value is not None for value in line.y)
        ],
        "log": panel.scale == "log",
        "percent": panel.percent,
        "zero": panel.from_zero,
    }


def _line(line: Line, number: int | None) -> dict[str, Any]:
    """number: among the lines that have no color of their own."""
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None]
    x, y = np.array([point[0] for point in points]), np.array([point[1] for point in points], dtype=np.float64)
    smoothed = line.smoothed and len(y) >= 20
    average = np.array(moving_average(y.tolist(), len(y) // 20)) if smoothed else None
    kept = thin(y)
    color = line.color or COLORS[(number or 0) % len(COLORS)]
    dash = _DASHES[int(line.dashed) if number is None else number // len(COLORS) % len(_DASHES)]
    return {
        "label": line.label,
        "seed": line.seed,
        "color": "var(--ink)" if color in (INK, COLORS[-1]) else f"var(--series-{COLORS.index(color)})",
        "dash": dash,
        "run": line.run,
        "dots": line.marked,
        "x": x[kept].tolist(),
        "y": _rounded(y[kept]),
        "average": None if average is None else _rounded(average[kept]),
    }


def moving_average(values: Sequence[float], radius: int) -> list[float]:
    """The mean of each value and up to `radius` neighbours on each side.

    Near the start the neighbourhood is symmetric, so that the average follows a loss that falls fast. Near the end it
    is not: it keeps all values on the left, so that the curve does not end in the noise of a single value.
    """
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    index = np.arange(len(values))
    near = np.minimum(radius, index)
    first, end = index - near, np.minimum(index + near + 1, len(values))
    means: list[float] = ((sums[end] - sums[first]) / (end - first)).tolist()
    return means


def thin(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Which of the values to show: all, or the lowest and the highest of each of MAX_POINTS / 2 equal parts, and the
    ends. So no outlier is lost."""
    if len(values) <= MAX_POINTS:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), MAX_POINTS // 2).astype(np.int64)
    kept = {0, len(values) - 1}
    for first, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        part = values[first:end]
        kept |= {first + int(part.argmin()), first + int(part.argmax())}
    return np.array(sorted(kept), dtype=np.int64)


def _rounded(values: NDArray[np.float64]) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


def _number(value: object) -> bool:
    return type(value) in (int, float)
