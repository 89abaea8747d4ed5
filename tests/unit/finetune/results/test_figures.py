from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from finetune.results import figures


@pytest.mark.parametrize(("every", "unit", "places"), [(1, "epoch", [1, 2]), (0.5, "step", [5, 10])])
def test_curves_by_epoch_or_by_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, every: float, unit: str, places: list[int]
) -> None:
    """Catches evaluations within an epoch that are drawn on top of each other, and a ring around the highest score of
    a metric of which less is better."""
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "save_figure", lambda canvas, path: drawn.append(canvas))
    rows: list[dict[str, Any]] = [
        {"epoch": number * every, "steps": number * 5, "train_loss": 1.0, "validation_loss": 1.0, "error": error}
        for number, error in ((1, 0.2), (2, 0.4))
    ]
    figures.draw_curves(tmp_path / "curves.png", {1: rows}, {1: every}, "error")
    _, scores = drawn[0].axes
    curve, ring = scores.lines
    assert list(curve.get_xdata()) == places
    assert scores.get_xlabel() == unit
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([places[0]], [0.2])


@pytest.mark.parametrize(("count", "least"), [(2, 14), (7, 12), (25, 10)])
def test_counts_of_a_confusion_matrix_fit_their_cells(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: int, least: int
) -> None:
    """Catches text that is tiny where there is room for more, and counts that overlap."""
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "save_figure", lambda canvas, path: drawn.append(canvas))
    counts = np.full((count, count), 9999, dtype=np.int64)
    figures.draw_confusion(tmp_path / "confusion.png", counts, [f"label {number}" for number in range(count)], "t")
    drawn[0].draw_without_rendering()
    axes = drawn[0].axes[0]
    first, second = axes.texts[:2]
    assert first.get_fontsize() >= least
    assert axes.get_yticklabels()[0].get_fontsize() >= least
    assert first.get_window_extent().x1 < second.get_window_extent().x0
