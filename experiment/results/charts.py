"""Charts of runs, and their data in a page, of bounded size however long the runs.

`page.js` draws them in pages, `plots` as PNG files.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiment.results.curves import MAX_POINTS, Curve, Points
from experiment.results.history import NO_AXIS, Axis

# Okabe & Ito (2008), "Color universal design": distinguishable with any kind of color vision.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
INK = "#1d2430"

_DASHES = ("", "7 3", "2 3")  # for more lines than colors; lengths of dashes and gaps
LOOKS = len(COLORS) * len(_DASHES)

_CHART_POINTS = 20_000  # of all curves in a chart; browsers draw them in less than 0.1 s
_FEWEST_POINTS = 100  # of a curve
_FEWEST_SMOOTHED = 20  # points
_DIGITS = 6  # of a y
_LEAST_SPREAD = 1e-6  # of values on an axis, compared with the largest


@dataclass(frozen=True)
class Line:
    """One curve.

    smoothed: draw a pale line behind its moving average, for noisy values. marked: show the points, for sparse values.
    """

    label: str
    curve: Curve
    smoothed: bool = False
    marked: bool = False
    color: str | None = None  # default: the color of `look`
    look: int | None = None  # default: the number of the line in its chart, among those without a color or a look
    run: int = 0  # which of the axes of its charts it has
    seed: str = ""  # tells lines of one label apart

    @property
    def has_average(self) -> bool:
        return self.smoothed and len(self.curve) >= _FEWEST_SMOOTHED


@dataclass(frozen=True)
class DrawnLine:
    """A line as a chart of a page shows it. Equal ones have the same data."""

    line: Line
    points: int  # that its curve has
    limit: int  # of the points that are shown
    color: str
    dash: str

    @property
    def name(self) -> str:
        """A name that is unique in its chart."""
        return f"{self.line.label}, {self.line.seed}" if self.line.seed else self.line.label

    @property
    def data(self) -> dict[str, Any]:
        """JSON of the line, as `page.js` describes."""
        line = self.line
        known = {"label": line.label, "seed": line.seed, "run": line.run, "dots": line.marked}
        average = _as_json(line.curve.average(self.limit)) if line.has_average else None
        drawn = {"color": style(self.color), "dash": self.dash}
        return {**known, **drawn, **_as_json(line.curve.points(self.limit)), "average": average}


@dataclass(frozen=True)
class Panel:
    """One set of axes with its curves."""

    y_label: str
    lines: Sequence[Line]
    scale: Literal["linear", "log"] = "linear"
    percent: bool = False  # y is a fraction
    from_zero: bool = False  # the y axis starts at 0
    title: str = ""  # on a page

    @property
    def options(self) -> dict[str, Any]:
        """JSON of the options, as `page.js` describes."""
        return {"log": self.scale == "log", "percent": self.percent, "zero": self.from_zero}

    @property
    def drawn(self) -> list[DrawnLine]:
        """The lines that have points. Of many, fewer points are shown."""
        limit = max(_FEWEST_POINTS, min(MAX_POINTS, _CHART_POINTS // max(len(self.lines), 1)))
        numbers, found = count(), []
        for line in self.lines:
            if line.color is None:
                color, dash = look(next(numbers) if line.look is None else line.look)
            else:
                color, dash = line.color, ""
            if points := len(line.curve):
                found.append(DrawnLine(line, points, limit, color, dash))
        return found


@dataclass(frozen=True)
class Plot:
    """Panels: one chart each on a page, together one PNG."""

    name: str  # of the PNG
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Mark:
    """An event at a step of the run."""

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
    def panels(self) -> list[Panel]:
        return [panel for plot in self.plots for panel in plot.panels]


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

    @cached_property
    def ticks(self) -> list[float]:
        """Round numbers, the first and last of which are the ends of the axis."""
        shown = [value for row in self.rows for value in (*row.values, row.mean, *(row.interval or ()))]
        low, high = min(shown), max(shown)
        size = max(abs(low), abs(high))
        spread = high - low if high - low > _LEAST_SPREAD * size else 0.0  # means of equal values differ by rounding
        least = (spread or size or 1.0) / 4
        power = 10.0 ** math.floor(math.log10(least))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        return [float(f"{number * step:.9g}") for number in range(first, max(last, first + 1) + 1)]

    def place(self, value: float) -> float:
        """Return the position of a value on the axis, in percent of its length."""
        first, *_, last = self.ticks
        return round(100 * (value - first) / (last - first), 2)


@dataclass(frozen=True)
class DotCharts:
    """A block of a page: charts that belong together, and that are one PNG."""

    name: str  # of the PNG
    charts: Sequence[DotChart]


class _Versioned(NamedTuple):
    """A piece, and the version of the page since which it is the same."""

    version: int
    value: object
    source: object  # equal ones give the same value


class ChartsData:
    """The data of charts, as `page.js` describes them, in pieces that change independently."""

    def __init__(self, charts: Charts, before: "ChartsData | None" = None, version: int = 0) -> None:
        """before: the data that a browser may have. version: of the page, which all differences from `before` get."""
        self._charts = [(panel.options, panel.drawn) for panel in charts.panels]
        self._axes = list(charts.axes) or [NO_AXIS]
        self._pieces: dict[object, _Versioned] = {}
        known = before._pieces if before else {}

        def add(name: object, source: object, make: Callable[[], object]) -> None:
            if (piece := known.get(name)) is None or piece.source != source:
                value = make()
                piece = _Versioned(piece.version if piece and piece.value == value else version, value, source)
            self._pieces[name] = piece

        marks = [vars(mark) for mark in charts.marks]
        add("marks", (marks, [[line.name for line in drawn] for _, drawn in self._charts]), lambda: marks)
        for number, axis in enumerate(self._axes):
            add(number, axis, partial(dict, axis))
        for number, (_, drawn) in enumerate(self._charts):
            for line in drawn:
                add((number, line.name), line, partial(getattr, line, "data"))

    def changes(self, since: int = -1) -> dict[str, Any] | None:
        """Return the changes after this version of the page, by default all of it; None if nothing has changed."""
        if all(piece.version <= since for piece in self._pieces.values()):
            return None

        def value(name: object, otherwise: str | None = None) -> object:
            piece = self._pieces[name]
            return piece.value if piece.version > since else otherwise

        axes = [value(number) for number in range(len(self._axes))]
        charts = [
            {**options, "lines": [value((number, line.name), line.name) for line in drawn]}
            for number, (options, drawn) in enumerate(self._charts)
        ]
        return {"axes": axes, "marks": self._pieces["marks"].value, "charts": charts}


def charts_block(plots: Sequence[Plot], axes: Sequence[Axis] = (), marks: Sequence[Mark] = ()) -> list[Charts]:
    """Return the panels that have data, as one block; empty if none has."""
    filled = [
        Plot(plot.name, [panel for panel in plot.panels if any(len(line.curve) for line in panel.lines)])
        for plot in plots
    ]
    shown = [plot for plot in filled if plot.panels]
    return [Charts(shown, axes, marks)] if shown else []


def look(number: int) -> tuple[str, str]:
    """Return the color and the dashes of the line of this number; `LOOKS` of them differ."""
    return COLORS[number % len(COLORS)], _DASHES[number // len(COLORS) % len(_DASHES)]


def style(color: str) -> str:
    """Return the color's name in the style sheet of a page."""
    return "var(--ink)" if color in (INK, COLORS[-1]) else f"var(--series-{COLORS.index(color)})"


def _as_json(points: Points) -> dict[str, list[float]]:
    x, y = points
    return {"x": x.tolist(), "y": _rounded(y).tolist()}


def _rounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round to six significant digits."""
    with np.errstate(divide="ignore"):
        places = np.clip(_DIGITS - 1 - np.floor(np.log10(np.abs(values))), -300, 300)
    up, down = 10.0 ** np.maximum(places, 0), 10.0 ** np.maximum(-places, 0)  # exact up to 1e22
    return np.asarray(np.round(values * up / down) * down / up)
