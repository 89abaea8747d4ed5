"""Figures of a fine-tuning run: confusion matrix and curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from experiment.results.charts import COLORS
from experiment.results.plots import GREY, save_figure

_MAX_ANNOTATED = 25  # with more labels, the matrix shows colors only


def draw_confusion(path: Path, confusion: NDArray[np.int64], labels: Sequence[str], title: str) -> None:
    """Draw counts CC: rows by label, columns by predicted label; colored by the share of the row."""
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    size = max(16 - len(labels) // 2, 10)  # of the text, in points
    side = min(2.5 + 0.05 * size * len(labels), 18.0)
    canvas = Figure(figsize=(side + 1.0, side), dpi=144, layout="constrained")
    axes = canvas.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    canvas.colorbar(image, ax=axes, label="share of the label's examples")
    axes.set_title(title, color=GREY, fontsize=size)
    axes.set_xlabel("predicted", color=GREY, fontsize=size)
    axes.set_ylabel("label", color=GREY, fontsize=size)
    if len(labels) <= _MAX_ANNOTATED:
        ticks = range(len(labels))
        axes.set_xticks(ticks, labels, rotation=45, ha="right", fontsize=size)
        axes.set_yticks(ticks, labels, fontsize=size)
        for row in ticks:
            for column in ticks:
                color = "white" if shares[row, column] > 0.5 else "black"
                count = f"{confusion[row, column]:,}"
                axes.text(column, row, count, ha="center", va="center", color=color, fontsize=size)
    save_figure(canvas, path)


def draw_curves(
    path: Path, epochs: Mapping[int, Sequence[Mapping[str, float]]], best: Mapping[int, float], metric: str
) -> None:
    """Loss on train and validation, and the metric on validation and perhaps train, by epoch; by step if there are
    evaluations within epochs. One color per seed; a ring marks the best epoch.

    epochs: seed -> rows of its epochs.csv. best: seed -> its best epoch.
    """
    canvas = Figure(figsize=(11.0, 4.2), dpi=144, layout="constrained")
    losses, scores = canvas.subplots(1, 2)
    whole = all(float(row["epoch"]).is_integer() for rows in epochs.values() for row in rows)
    unit, label = ("epoch", "epoch") if whole else ("steps", "step")
    for (seed, rows), color in zip(epochs.items(), COLORS * len(epochs), strict=False):
        x = [row[unit] for row in rows]
        losses.plot(x, [row["train_loss"] for row in rows], "--.", color=color, linewidth=1.2)
        if metric not in rows[0]:  # no validation split
            continue
        kept = next(row for row in rows if row["epoch"] == best[seed])
        losses.plot(x, [row["validation_loss"] for row in rows], "-o", color=color, markersize=4)
        scores.plot(x, [row[metric] for row in rows], "-o", color=color, markersize=4, label=f"seed {seed}")
        if f"train_{metric}" in rows[0]:
            scores.plot(x, [row[f"train_{metric}"] for row in rows], "--.", color=color, linewidth=1.2)
        scores.plot(kept[unit], kept[metric], "o", color=color, markersize=10, fillstyle="none")
    last = max(row[unit] for rows in epochs.values() for row in rows)
    trained = any(f"train_{metric}" in rows[0] for rows in epochs.values())
    splits = "(dashed: train, solid: validation)"
    for axes, y_label in ((losses, f"loss {splits}"), (scores, f"{metric} {splits if trained else 'on validation'}")):
        axes.set_xlim((0.5, last + 0.5) if whole else (0.0, 1.03 * last))
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.set_xlabel(label, color=GREY)
        axes.set_ylabel(y_label, color=GREY)
        axes.grid(color="#e8ebf0", linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
    if scores.has_data():
        scores.legend(frameon=False, labelcolor=GREY)
    save_figure(canvas, path)
