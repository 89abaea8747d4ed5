"""Numbers, durations and tables as text for people."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

UNKNOWN = "–"
"""The text for an unknown value."""

FILE_WIDTH = 5000
"""Limit of a table in a pipe or file, in columns: no cell is cut off."""


def show(value: float | None, spec: str) -> str:
    """Format a number, such as with ',.1f'; '–' for None."""
    return UNKNOWN if value is None else format(value, spec)


def counted(number: int, noun: str, plural: str = "s") -> str:
    """Format a count: '1 step', '1,000 steps'; with the plural 'es': '2 batches'."""
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def shorten(text: str, characters: int = 40) -> str:
    """Cut a text that is longer, with an ellipsis at its end."""
    return text if len(text) <= characters else f"{text[: characters - 1]}…"


def describe_duration(seconds: float | None) -> str:
    """Format a duration: '1h05m', '2m10s' or '9s'; '–' for None."""
    if seconds is None:
        return UNKNOWN
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def format_perplexity(value: float | None) -> str:
    """Format with four digits or more: '8,448', '66.60' or '3.971'; '–' for None."""
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if 999.95 <= value < 1e7 else f"{value:#.4g}"


def format_parameters(count: int) -> str:
    """Format a parameter count: '110.0 M parameters', '42,674 parameters'."""
    return f"{count / 1e6:,.1f} M parameters" if count >= 1e5 else f"{count:,} parameters"


def format_epochs(value: float) -> str:
    """Format with three digits or more: '0.0213 epochs', '1 epoch' or '8,832 epochs'."""
    number = f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"
    return f"{number} epoch{'' if number == '1' else 's'}"


def escape_markdown(text: str) -> str:
    """Escape plain text for Markdown, on one line."""
    text = re.sub(r"([\\`*<>|\[\]~&$])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)  # within a word it is an ordinary character


def csv_table(rows: Iterable[Sequence[object]]) -> str:
    """Format rows as CSV; the first one names the columns."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], labels: int | None = None) -> str:
    """Return a table that ends with a newline. Cells are Markdown. Columns after the first `labels` hold numbers."""
    rule = "|".join("---" if labels is None or number < labels else "---:" for number in range(len(columns)))
    header, *lines = [f"| {' | '.join(cells)} |\n" for cells in [columns, *rows]]
    return "".join([header, f"|{rule}|\n", *lines])


def table_console() -> "Console":
    """Return a console on stdout for tables, which prints text as it is. In a pipe or file no cell is cut off. Printing
    raises BrokenPipeError if the process that reads stdout has exited."""
    from rich.console import Console

    class StdoutConsole(Console):
        def on_broken_pipe(self) -> None:
            raise  # the default is to exit with 1

    if not (console := StdoutConsole(markup=False, emoji=False, highlight=False)).is_terminal:
        console.width = FILE_WIDTH
    return console


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], labels: int = 1, title: str | None = None
) -> None:
    """Print a table on stdout. labels: how many columns, from the left, are text; the others are numbers."""
    from rich.table import Table

    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < labels else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    table_console().print(table)
