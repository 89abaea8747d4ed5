"""Read CSV and JSON lines strictly and row by row: a malformed row raises UserError with file and line.

`origin` is what messages call the file: its path, or archive::member. Lines are counted from 1.
"""

import csv
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from experiment.errors import UserError
from experiment.files import parse_json

log = logging.getLogger(__name__)

# An unclosed quote swallows the rows after it. No real field is longer than this many characters.
_MAX_FIELD = 1 << 27


@dataclass(frozen=True)
class CsvFormat:
    """How to read a CSV file; quoting and header as in pandas, where quoting 0, 1 and 2 differ only in writing."""

    separator: str | None = None  # None: a comma
    quoting: Literal[0, 1, 2, 3] = 0  # 3: quotes are ordinary characters
    header: bool = True
    quoting_key: str = "quoting"  # what messages call the option
    on_bad_lines: Literal["error", "skip", "drop_extra"] = "error"  # of another width; skipped ones with a warning


class CsvRow(NamedTuple):
    line: int  # where it begins: a quoted field may hold line breaks
    cells: list[str]


class JsonRow(NamedTuple):
    line: int
    cells: dict[str, Any]


def text_lines(stream: Iterable[bytes], origin: str) -> Iterator[str]:
    """The lines of a UTF-8 file, with their line ends and without a byte order mark."""
    for number, raw in enumerate(stream, 1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{origin}:{number}: not UTF-8 text (byte 0x{raw[error.start]:02x} at column {error.start + 1}); "
                "convert the file first, for instance with iconv"
            ) from None
        yield line.removeprefix("\ufeff") if number == 1 else line


def read_csv(lines: Iterable[str], origin: str, csv_format: CsvFormat) -> tuple[list[str], Iterator[CsvRow]]:
    """Column names and rows of a CSV file. Empty lines are skipped.

    Without a header, columns are named "0", "1", …. A file without rows has no columns.
    """
    rows = _csv_rows(lines, origin, csv_format)
    first = next(rows, None)
    if first is None:
        return [], rows
    if csv_format.header:
        return first.cells, _of_equal_length(rows, len(first.cells), origin, csv_format)
    names = [str(index) for index in range(len(first.cells))]
    return names, _of_equal_length(_chain(first, rows), len(names), origin, csv_format)


def _csv_rows(lines: Iterable[str], origin: str, csv_format: CsvFormat) -> Iterator[CsvRow]:
    csv.field_size_limit(_MAX_FIELD)
    quoting: Literal[0, 3] = csv.QUOTE_NONE if csv_format.quoting == csv.QUOTE_NONE else csv.QUOTE_MINIMAL
    reader = csv.reader(lines, delimiter=csv_format.separator or ",", quoting=quoting, strict=True)
    line = 1
    try:
        for cells in reader:
            if cells:
                yield CsvRow(line, cells)
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{origin}:{line}: malformed row: {error}{_quoting_hint(csv_format)}") from None


def _chain(first: CsvRow, rows: Iterator[CsvRow]) -> Iterator[CsvRow]:
    yield first
    yield from rows


def _of_equal_length(rows: Iterator[CsvRow], length: int, origin: str, csv_format: CsvFormat) -> Iterator[CsvRow]:
    skipped: list[int] = []
    for row in rows:
        if len(row.cells) == length:
            yield row
        elif csv_format.on_bad_lines == "drop_extra" and len(row.cells) > length:
            yield CsvRow(row.line, row.cells[:length])
        elif csv_format.on_bad_lines == "skip":
            skipped.append(row.line)
        else:
            raise UserError(
                f"{origin}:{row.line}: expected {length} columns, found {len(row.cells)}{_quoting_hint(csv_format)}"
            )
    if skipped:
        log.warning(
            "%s: skipped %d rows that do not have %d columns, such as line %d", origin, len(skipped), length, skipped[0]
        )


def _quoting_hint(csv_format: CsvFormat) -> str:
    hint = f"; is the separator {csv_format.separator or ','!r}?"
    if csv_format.quoting != csv.QUOTE_NONE:
        hint += f" If quotes are ordinary characters, set {csv_format.quoting_key} 3"
    return hint


def read_json_lines(lines: Iterable[str], origin: str) -> Iterator[JsonRow]:
    """The rows of a file with one JSON object per line. Empty lines are skipped."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{origin}:{number}: expected one JSON object per line: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{origin}:{number}: expected one JSON object per line, found {line.strip()[:60]}")
        yield JsonRow(number, row)


def column_index(names: Sequence[str], column: str, place: str, key: str) -> int:
    """Position of a column. place: file, perhaps with line; key: the option that names the column."""
    if column not in names:
        raise missing_column(place, column, names, key)
    if names.count(column) > 1:
        raise UserError(f"{place}: {names.count(column)} columns are called '{column}' ({key} names the column)")
    return names.index(column)


def missing_column(place: str, column: str, names: Iterable[str], key: str) -> UserError:
    return UserError(f"{place}: no column '{column}'; found: {', '.join(map(str, names))} ({key} names the column)")


def unexpected_cell(place: str, column: str, value: object, expected: str = "text", hint: str = "") -> UserError:
    found = json.dumps(value, default=str, ensure_ascii=False)[:60]
    return UserError(f"{place}: expected {expected} in '{column}', found {found}{hint}")
