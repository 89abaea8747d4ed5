"""Curves of runs as the charts of a page, see `page.js`: of bounded size, however long the runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiment.results.page import Chart, Charts
from experiment.results.plots import COLORS, INK, Line, Panel, draw_panels, moving_average
from experiment.tracking.jsonl import Event

MAX_POINTS = 2000  # of a curve
_DASHES = ("", "7 3", "2 3")  # for more lines than colors
_AXES = ("step", "tokens", "seconds")

Axis = Mapping[str, Sequence[float]]
"""Tokens and seconds of training at some steps of a run; empty where not known."""


@dataclass(frozen=True)
class Plot:
    """Panels that are one PNG, and one chart each on a page."""

    name: str  # of the PNG
    panels: Sequence[tuple[str, Panel]]  # with titles


@dataclass(frozen=True)
class Mark:
    """What happened at a step of the run."""

    kind: str  # restart, bad, stage or best
    step: int
    text: str


def charts_block(
    plots: Sequence[Plot], directory: Path, axes: Sequence[Axis] = (), marks: Sequence[Mark] = (), prefix: str = ""
) -> list[Charts]:
    """The panels that have data; empty if none has. Writes a PNG of each plot to `directory`.

    axes: of the runs of the lines. prefix: keeps the images of several runs on one page apart.
    """
    charts, data = [], []
    for plot in plots:
        panels = [(title, panel) for title, panel in plot.panels if any(line.x for line in panel.lines)]
        image = f"{prefix}{plot.name}.png"
        if panels:
            draw_panels(directory / image, [panel for _, panel in panels])
        for title, panel in panels:
            charts.append(Chart(title, image))
            data.append(_chart(panel))
            image = ""  # it has all panels
    shared = {"axes": list(axes) or [x_axis([])], "marks": [vars(mark) for mark in marks]}
    return [Charts(charts, shared | {"charts": data})] if charts else []


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
        "color": "var(--ink)" if color in (INK, COLORS[-1]) else f"var(--series-{COLORS.index(color)})",
        "dash": dash,
        "run": line.run,
        "dots": line.marked,
        "x": x[kept].tolist(),
        "y": _rounded(y[kept]),
        "average": None if average is None else _rounded(average[kept]),
    }


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
