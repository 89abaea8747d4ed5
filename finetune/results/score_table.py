"""Tables of scores on stdout."""

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

_LABELS = 30  # more are in results.json only

Describe = Callable[[Any], str]
"""The text of a score."""


def print_scores(
    title: str, splits: Mapping[str, Mapping[str, Any]], metric: str | None, describe: Describe = "{:.4f}".format
) -> None:
    """A row for each metric, a column for each split. metric: the one to mark, if any."""
    if not splits:
        return
    table = _table(title, *splits)
    for name in next(iter(splits.values())):
        cells = [describe(scores[name]) for scores in splits.values()]
        table.add_row(f"{name} *" if name == metric else name, *cells)
    Console().print(table)


def print_label_scores(
    title: str, labels: Mapping[str, Mapping[str, Any]], describe: Describe = "{:.4f}".format
) -> None:
    """A row for each label, the most frequent first."""
    table = _table("label", "precision", "recall", "f1", "support")
    table.title = title
    by_support = sorted(labels.items(), key=lambda item: -item[1]["support"])
    for label, scores in by_support[:_LABELS]:
        cells = [describe(scores[name]) for name in ("precision", "recall", "f1")]
        table.add_row(label, *cells, f"{scores['support']:,}")
    if len(labels) > _LABELS:
        table.add_row(f"… and {len(labels) - _LABELS} more")
    Console(markup=False).print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table()
    table.add_column(title)
    for name in columns:
        table.add_column(name, justify="right")
    return table
