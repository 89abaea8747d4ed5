"""Text and tables in Markdown."""

import re
from collections.abc import Iterable, Sequence


def escape(text: str) -> str:
    """Plain text as Markdown, on one line."""
    text = re.sub(r"([\\`*<>|\[\]~&$])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)  # within a word it is an ordinary character


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], labels: int | None = None) -> str:
    """A table that ends with a newline. Cells are Markdown. The columns after the first `labels` hold numbers."""
    rule = "|".join("---" if labels is None or number < labels else "---:" for number in range(len(columns)))
    header, *lines = [f"| {' | '.join(cells)} |\n" for cells in [columns, *rows]]
    return "".join([header, f"|{rule}|\n", *lines])
