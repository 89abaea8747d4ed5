"""The table of scores on stdout."""

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def print_scores(
    title: str,
    splits: Mapping[str, Mapping[str, Any]],
    metric: str,
    describe: Callable[[Any], str] = "{:.4f}".format,
) -> None:
    """A row for each metric, a column for each split. metric: the one to mark; describe: the text of a score."""
    table = Table()
    table.add_column(title)
    for split in splits:
        table.add_column(split, justify="right")
    for name in next(iter(splits.values())):
        cells = [describe(scores[name]) for scores in splits.values()]
        table.add_row(f"{name} *" if name == metric else name, *cells)
    Console().print(table)
