"""The pictures of a fine-tuning run: its confusion matrix and its curves."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiment.figures import COLOURS, GREY, Line, Panel, draw_panels

_WRITTEN_OUT = 25  # labels: of more, the matrix shows colours only


def draw_confusion(path: Path, confusion: NDArray[np.int64], labels: Sequence[str], title: str) -> None:
    """The CC counts of gold label by predicted label, coloured by the share of the gold label's examples."""
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = min(2.5 + 0.55 * len(labels), 16.0)
    canvas = Figure(figsize=(side + 1.0, side), dpi=144, layout="constrained")
    axes = canvas.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    canvas.colorbar(image, ax=axes, label="share of the label's examples")
    axes.set_title(title, color=GREY, fontsize=10)
    axes.set_xlabel("predicted", color=GREY)
    axes.set_ylabel("label", color=GREY)
    if len(labels) <= _WRITTEN_OUT:
        ticks = range(len(labels))
        axes.set_xticks(ticks, labels, rotation=45, ha="right")
        axes.set_yticks(ticks, labels)
        for row in ticks:
            for column in ticks:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(
                    column, row, f"{confusion[row, column]:,}", ha="center", va="center", color=colour, fontsize=8
                )
    _replace(path, lambda aside: canvas.savefig(aside, format="png", facecolor="white"))


def draw_curves(path: Path, epochs: Mapping[int, Sequence[Mapping[str, float]]], metric: str) -> None:
    """Loss on train and validation, and the metric on validation, by epoch; a line per seed.

    epochs: seed -> what stands in its epochs.csv.
    """

    def lines(key: str, label: str) -> list[Line]:
        return [
            Line(
                f"{label}, seed {seed}",
                [row["epoch"] for row in rows],
                [row[key] for row in rows],
                marked=True,
                colour=colour,
            )
            for (seed, rows), colour in zip(epochs.items(), COLOURS * len(epochs), strict=False)
        ]

    panels = [
        Panel("loss on train", lines("train_loss", "train")),
        Panel("loss on validation", lines("validation_loss", "validation")),
        Panel(f"{metric} on validation", lines(metric, "validation")),
    ]
    _replace(path, lambda aside: draw_panels(aside, panels, x_label="epoch"))


def _replace(path: Path, draw: Callable[[Path], None]) -> None:
    """Draw aside and move into place: a reader sees the old picture or the new one."""
    aside = path.with_name(f".{path.name}")
    draw(aside)
    aside.replace(path)
