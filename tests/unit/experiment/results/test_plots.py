import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiment.errors import warn_once
from experiment.results import plots as figures
from experiment.results.charts import LOOKS, Charts, DotChart, DotCharts, Dots, Line, Panel, Plot
from experiment.results.curves import Curve
from experiment.results.plots import draw_charts, draw_panels, save_figure


@pytest.fixture
def canvases(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The matplotlib figures that a test draws."""
    drawn: list[Figure] = []

    class Recorded(Figure):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[arg-type]
            drawn.append(self)

    monkeypatch.setattr(figures, "Canvas", Recorded)
    return drawn


def inked(path: Path) -> float:
    """The share of pixels that are not white."""
    return float(np.mean(matplotlib.image.imread(path)[..., :3].min(axis=-1) < 1.0))


def test_panels_show_every_line_and_a_legend_where_there_are_several(tmp_path: Path, canvases: list[Figure]) -> None:
    """Catches missing curves, null values drawn as zero, and an ignored color."""
    loss = [
        Line("training", Curve.of([1, 2, 3], [3.0, None, 1.0]), color="#000000"),
        Line("wiki", Curve.of([1, 3], [4.0, 2.0]), marked=True),
    ]
    draw_panels(
        tmp_path / "a" / "loss.png",
        [Panel("loss", loss), Panel("lr", [Line("lr", Curve.of([1, 2, 3], [0.1, 0.2, 0.3]))])],
    )
    upper, lower = canvases[0].axes
    assert [line.get_label() for line in upper.lines] == ["training", "wiki"]
    assert upper.lines[0].get_xydata().tolist() == [[1, 3.0], [3, 1.0]]
    assert upper.lines[0].get_color() == "#000000"
    assert upper.get_legend() is not None
    assert lower.get_legend() is None
    assert (upper.get_ylabel(), lower.get_ylabel(), lower.get_xlabel()) == ("loss", "lr", "step")
    assert inked(tmp_path / "a" / "loss.png") > 0.005
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["loss.png"]


def test_charts_of_one_name_are_files_of_their_own(tmp_path: Path, canvases: list[Figure]) -> None:
    """Catches charts of one task that overwrite those of another, and a block of a page that is no chart."""
    panels = [Panel(label, [Line("a", Curve.of([1, 2], [1.0, 2.0]))]) for label in ("speed", "wait")]
    draw_charts(tmp_path, [Charts([Plot("speed", panels)]), "text", Charts([Plot("speed", panels[:1])])])
    assert {path.name for path in tmp_path.iterdir()} == {"speed.png", "speed-2.png"}
    assert [len(canvas.axes) for canvas in canvases] == [2, 1]


def test_scales_and_limits(tmp_path: Path, canvases: list[Figure]) -> None:
    """Catches a linear axis for perplexities up to 30,000, and an axis that exaggerates a difference."""
    line = Line("a", Curve.of([1, 2], [10.0, 30000.0]))
    speed = Panel("s", [Line("a", Curve.of([1, 2], [0.5, 0.6]))], percent=True, from_zero=True)
    draw_panels(tmp_path / "f.png", [Panel("p", [line], "log"), speed])
    upper, lower = canvases[0].axes
    assert upper.get_yscale() == "log"
    assert lower.get_ylim()[0] == 0.0
    assert "%" in lower.yaxis.get_major_formatter()(0.5)


@pytest.mark.parametrize("y", [[], [None, None], [1.0], [2.0] * 50])
def test_odd_curves_are_drawn(tmp_path: Path, y: list[float | None]) -> None:
    """Catches a report that fails for a run with few events or without gradient norms."""
    panel = Panel("y", [Line("a", Curve.of(range(len(y)), y), smoothed=True), Line("b", Curve.of([1, 2], [1.0, 2.0]))])
    draw_panels(tmp_path / "f.png", [panel])
    assert inked(tmp_path / "f.png") > 0.0


def test_dots_are_drawn_with_their_mean_and_interval(tmp_path: Path, canvases: list[Figure]) -> None:
    """Catches a mean that is shown without its seeds or its interval, and a task that is missing."""
    rows = [Dots("pretrained", [0.8, 0.9], 0.85, (0.78, 0.91)), Dots("$ran{dom", [0.5, 0.7], 0.6)]
    draw_charts(tmp_path, [DotCharts("scores", [DotChart("accuracy", rows), DotChart("f1", rows[:1])])])
    first, second = canvases[0].axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["pretrained", "$ran{dom"]
    assert [text.get_text() for text in first.texts] == ["0.850", "0.600"]
    drawn = [line.get_xdata() for line in first.lines]
    assert [list(x) for x in drawn] == [[0.8, 0.9], [0.78, 0.91], [0.85, 0.85], [0.5, 0.7], [0.6, 0.6]]
    assert first.get_ylim()[0] > first.get_ylim()[1], "the first row is at the top"
    assert (first.get_xlabel(), second.get_xlabel()) == ("accuracy", "f1")
    assert inked(tmp_path / "scores.png") > 0.005


def test_names_with_dollars_are_no_formulas(tmp_path: Path) -> None:
    """Catches a report that ends in a traceback of matplotlib's formula parser because of the name of a run."""
    lines = [Line(name, Curve.of([1, 2], [1.0, 2.0])) for name in ("$5_to_$10", "$\\frac{$")]
    panel = Panel("$\\loss$", lines, "log")
    draw_panels(tmp_path / "loss.png", [panel])
    assert inked(tmp_path / "loss.png") > 0.0


@pytest.mark.parametrize("count", [2, LOOKS, LOOKS + 1, 60])
def test_a_legend_leaves_room_for_the_lines(tmp_path: Path, canvases: list[Figure], count: int) -> None:
    """Catches a legend of many runs that covers the lines, or shrinks the axes to nothing with a warning."""
    lines = [Line(f"learning rate {number}", Curve.of([1, 2], [number, 2.0])) for number in range(count)]
    draw_panels(tmp_path / "loss.png", [Panel("loss", lines)] * 2)
    for axes in canvases[0].axes:
        legend, height = axes.get_legend(), axes.get_window_extent().height
        assert height > 0.35 * canvases[0].bbox.height
        assert (legend is not None) == (count <= LOOKS)
        assert legend is None or legend.get_window_extent().height < height / 2


def test_the_settings_of_a_notebook_stay(tmp_path: Path) -> None:
    """Catches plots of a user whose fonts and formulas are gone after a call of ours."""
    with matplotlib.rc_context({"font.family": ["serif"]}):
        draw_panels(tmp_path / "loss.png", [Panel("loss", [Line("a", Curve.of([1, 2], [1.0, 2.0]))])])
        assert matplotlib.rcParams["font.family"] == ["serif"]
        assert matplotlib.rcParams["text.parse_math"]
    code = (
        "import matplotlib\nbefore = dict(matplotlib.rcParams)\nimport experiment.results.plots\n"
        "assert dict(matplotlib.rcParams) == before"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[4], check=True)


def test_characters_without_a_font_are_one_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a warning for each character of each Chinese label or each figure, and one for text that can be drawn."""
    for text, expected in (("caf\u00e9", 0), ("\ue000\ue001\ue002", 1)):  # private use: in no font
        caplog.clear()
        warn_once.cache_clear()
        for _ in range(2):
            canvas = Figure(figsize=(1, 1))
            canvas.text(0.1, 0.5, text)
            save_figure(canvas, tmp_path / "figure.png")
        assert [record.message.count("fonts-noto-cjk") for record in caplog.records] == [1] * expected


def test_other_warnings_are_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a figure that hides what matplotlib warns of."""
    canvas = Figure(figsize=(1, 1))
    monkeypatch.setattr(canvas, "savefig", lambda *_, **__: warnings.warn("other", UserWarning, stacklevel=1))
    monkeypatch.setattr(figures, "atomic_write", lambda path: nullcontext(path))
    with pytest.warns(UserWarning, match="other"):
        save_figure(canvas, tmp_path / "figure.png")
