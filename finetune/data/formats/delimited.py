"""CSV and TSV."""

import csv
import logging
from collections.abc import Iterator
from pathlib import Path

from experiment.csv_and_jsonl import CsvFormat, CsvRow, read_csv
from experiment.errors import UserError
from finetune.data.formats.row import Row, open_lines

log = logging.getLogger(__name__)


def read_delimited(path: Path, csv_format: CsvFormat) -> Iterator[Row]:
    """The rows of a CSV file.

    If a quoted field seems to hold further rows, rejects it if the separator is a tab; otherwise warns, since texts
    have commas.
    """
    warned = False
    with open_lines(path) as lines:
        names, rows = read_csv(lines, str(path), csv_format)
        for row in rows:
            if not warned and (message := _swallowed_rows(row, csv_format)):
                if csv_format.separator == "\t":
                    raise UserError(f"{path}:{row.line}: {message}")
                warned = True
                log.warning("%s:%d: %s", path, row.line, message)
            yield Row(f"{path}:{row.line}", names, row.cells, f"{path}:1", numbered=True)


def _swallowed_rows(row: CsvRow, csv_format: CsvFormat) -> str | None:
    """A message if a field has line breaks and what follows them looks like rows."""
    for cell in row.cells:
        if csv_format.quoting != csv.QUOTE_NONE and ("\n" in cell or "\r" in cell):
            separators = [line.count(csv_format.separator or ",") for line in cell.splitlines()[1:]]
            expected = 1 if csv_format.separator == "\t" else len(row.cells) - 1
            if expected and any(count >= expected for count in separators):
                return (
                    f"a quoted field spans {len(separators) + 1} lines that look like rows: is its quote an ordinary "
                    f"character? Then set {csv_format.quoting_key} 3"
                )
    return None
