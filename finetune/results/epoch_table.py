"""The table of a seed's epochs on the terminal."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

_TITLES = {"steps": "step", "train_loss": "train loss", "validation_loss": "valid. loss"}


def print_epochs(console: Console, title: str, epochs: Sequence[Mapping[str, float]], best_epoch: float) -> None:
    """Losses, scores and seconds of each epoch, or of each evaluation. best_epoch: the one to mark.

    epochs: the rows of epochs.csv.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for name in epochs[0]:
        table.add_column(_TITLES.get(name, name.replace("_", " ")), justify="right")
    for row in epochs:
        cells = [_cell(name, value) for name, value in row.items()]
        table.add_row(*cells, style="bold" if row["epoch"] == best_epoch else None)
    console.print(table, soft_wrap=False)


def _cell(name: str, value: float) -> str:
    if name == "epoch":
        return f"{value:.4g}"
    if name == "steps":
        return f"{value:,}"
    return f"{value:.1f}" if name == "seconds" else f"{value:.4f}"
