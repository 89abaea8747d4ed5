"""Charts as PNG files in one style."""

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.font_manager import fontManager
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from experiment.errors import warn_once
from experiment.files import atomic_write
from experiment.results.charts import COLORS, LOOKS, Charts, DotChart, DotCharts, DrawnLine, Panel

GREY = "#596579"
_WIDTH = 1.8  # of a line, in points, as which matplotlib counts the lengths of dashes

# Fonts for Chinese, Japanese and Korean, which matplotlib's own lacks.
_CJK_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei"),
    *("Microsoft YaHei", "SimHei", "PingFang SC", "Heiti SC", "Arial Unicode MS"),
)
_INSTALLED = {font.name for font in fontManager.ttflist}
_FONTS = ["DejaVu Sans", *(name for name in _CJK_FONTS if name in _INSTALLED)]


def draw_charts(directory: Path, blocks: Sequence[object]) -> None:
    """Save the charts among the blocks of a page as NAME.png; the second of a name as NAME-2.png, and so on."""
    drawn: Counter[str] = Counter()
    for block in blocks:
        for plot in [block] if isinstance(block, DotCharts) else block.plots if isinstance(block, Charts) else []:
            drawn[plot.name] += 1
            path = directory / f"{plot.name}{f'-{drawn[plot.name]}' if drawn[plot.name] > 1 else ''}.png"
            if isinstance(plot, DotCharts):
                draw_dots(path, plot.charts)
            else:
                draw_panels(path, plot.panels)


def draw_panels(path: Path, panels: Sequence[Panel]) -> None:
    """Draw panels below each other with a shared x axis, and save them as a PNG."""
    canvas = Canvas(figsize=(9, 1.0 + 3.2 * len(panels)), dpi=144, layout="constrained")
    column = canvas.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(column, panels, strict=True):
        _draw_panel(axes, panel)
    column[-1].set_xlabel("step", color=GREY)
    column[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True))
    column[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    save_figure(canvas, path)


def draw_dots(path: Path, charts: Sequence[DotChart]) -> None:
    """Draw charts below each other and save them as a PNG."""
    heights = [1.2 + 0.6 * len(chart.rows) for chart in charts]
    canvas = Canvas(figsize=(9, sum(heights)), dpi=144, layout="constrained")
    column = canvas.subplots(len(charts), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, chart in zip(column, charts, strict=True):
        for row, dots in enumerate(chart.rows):
            axes.plot(dots.values, [row] * len(dots.values), "o", color=COLORS[0], alpha=0.5, markersize=8, mew=0)
            if dots.interval:
                axes.plot(dots.interval, [row, row], color=COLORS[0], linewidth=2)
            axes.plot([dots.mean, dots.mean], [row - 0.28, row + 0.28], color=COLORS[0], linewidth=2.5)
            axes.annotate(f"{dots.mean:.3f}", (dots.mean, row - 0.32), ha="center", va="bottom", color=COLORS[0])
        axes.set_yticks(range(len(chart.rows)), [dots.label for dots in chart.rows])
        axes.set_ylim(len(chart.rows) - 0.4, -0.75)
        axes.set_xticks(chart.ticks)
        axes.set_xlabel(chart.title, color=GREY)
        _tidy(axes, grid="x")
    save_figure(canvas, path)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for drawn in panel.drawn:
        _draw_line(axes, drawn)
    if panel.scale == "log" and any(drawn.line.curve.highest[1] > 0 for drawn in panel.drawn):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(panel.y_label, color=GREY)
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if panel.from_zero:
        axes.set_ylim(bottom=0.0)
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    if 1 < len(entries) <= LOOKS:  # with more, looks repeat, and the legend would cover the lines
        columns = math.ceil(len(entries) / len(COLORS))
        legend = axes.legend(entries.values(), entries.keys(), ncols=columns, frameon=False, labelcolor=GREY)
        legend.set_in_layout(False)  # one that is larger than the axes would shrink them
    _tidy(axes, grid="both")


def _draw_line(axes: Axes, drawn: DrawnLine) -> None:
    line, color = drawn.line, drawn.color
    x, y = line.curve.points()
    if line.has_average:
        axes.plot(x, y, color=color, linewidth=0.8, alpha=0.3)
        x, y = line.curve.average()
    marker = "o" if line.marked or len(y) == 1 else None
    style = (0, [float(length) / _WIDTH for length in drawn.dash.split()]) if drawn.dash else "-"
    axes.plot(x, y, linestyle=style, color=color, lw=_WIDTH, marker=marker, markersize=4.5, label=line.label)


def _tidy(axes: Axes, grid: Literal["x", "both"]) -> None:
    axes.grid(axis=grid, color="#e8ebf0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=GREY, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c9d0da")


def save_figure(canvas: Canvas, path: Path) -> None:
    """Write a PNG, replacing an old one atomically. The settings of matplotlib, such as those of a notebook, stay."""
    for text in canvas.findobj(Text):
        text.set(family=_FONTS, parse_math=False)  # names may have dollars
    with warnings.catch_warnings(record=True) as caught, atomic_write(path) as temporary:
        warnings.simplefilter("always")
        canvas.savefig(temporary, format="png", facecolor="white")
    other = [warning for warning in caught if "missing from font" not in str(warning.message)]
    for warning in other:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if len(other) < len(caught):  # there is one for each character
        warn_once("characters that no installed font has are boxes in figures; for Chinese, install fonts-noto-cjk")
