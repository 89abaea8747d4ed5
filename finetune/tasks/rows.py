"""Reading the rows of a task from CSV, TSV and JSONL, strictly: what is wrong is refused with file and line."""

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiment.errors import UserError

if TYPE_CHECKING:
    import _csv

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}


@dataclass(frozen=True)
class TableFormat:
    """How a CSV or TSV file is to be read, in pandas' terms. `sep` None: what the file's suffix says."""

    sep: str | None = None
    quoting: int = csv.QUOTE_MINIMAL
    header: int | None = 0


@dataclass(frozen=True)
class Row:
    line: int  # of the file, from 1; of a row with line breaks inside quotes, the last one
    values: Mapping[str, str]  # role (text, label …) -> what the column in that role holds


@dataclass(frozen=True)
class Table:
    path: Path
    rows: tuple[Row, ...]
    labelled: bool  # whether the rows have the role "label"


def read_table(path: Path, columns: Mapping[str, str], table_format: TableFormat, label_required: bool = True) -> Table:
    """The rows of `path`, with the column named `columns[role]` as value of each role.

    `label_required` False allows a file without the label column, or with nothing in it: then no row has a label.
    Text is kept as it is, labels are stripped. Raises UserError naming file and line.
    """
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    optional = set() if label_required else {"label"}
    if kind == ".jsonl":
        rows = list(_json_rows(path, columns, optional))
    elif kind in _SEPARATORS:
        rows = list(_csv_rows(path, columns, optional, table_format, table_format.sep or _SEPARATORS[kind]))
    else:
        raise UserError(f"{path}: expected a file that ends in .csv, .tsv, .txt or .jsonl (or one of these and .gz)")
    if not rows:
        raise UserError(f"{path} has no rows")
    return _check_labels(path, rows, label_required)


def _check_labels(path: Path, rows: list[Row], label_required: bool) -> Table:
    rows = [
        Row(row.line, {**row.values, "label": row.values["label"].strip()} if "label" in row.values else row.values)
        for row in rows
    ]
    labelled = any(row.values.get("label") for row in rows)
    unlabelled = [row.line for row in rows if not row.values.get("label")]
    if unlabelled and (label_required or labelled):
        more = f" (and {len(unlabelled) - 1} more lines)" if len(unlabelled) > 1 else ""
        raise UserError(f"{path}, line {unlabelled[0]}{more}: the label is empty")
    return Table(path, tuple(rows), labelled)


def _csv_rows(
    path: Path, columns: Mapping[str, str], optional: set[str], table_format: TableFormat, separator: str
) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # texts may be longer than csv's default of 128 KiB
    with _open(path) as file:
        reader = csv.reader(_text_lines(path, file), delimiter=separator, quoting=table_format.quoting, strict=True)  # type: ignore[arg-type]
        records = _records(path, reader)
        line, first = next(records, (0, []))
        places = _find_columns(path, first, columns, optional, named=table_format.header is not None)
        if first and table_format.header is None:
            yield Row(line, {role: first[place] for role, place in places.items()})
        for line, record in records:
            if len(record) != len(first):
                raise UserError(
                    f"{path}, line {line}: expected {len(first)} columns, found {len(record)}; "
                    f"is task.sep {separator!r} right, and task.quoting {table_format.quoting}?"
                )
            yield Row(line, {role: record[place] for role, place in places.items()})


def _records(path: Path, reader: "_csv.Reader") -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of every record that is not an empty line."""
    try:
        for record in reader:
            if record:
                yield reader.line_num, record
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: {error}; where quotes are characters like any other, set task.quoting: 3"
        ) from None


def _find_columns(
    path: Path, first: list[str], columns: Mapping[str, str], optional: set[str], named: bool
) -> dict[str, int]:
    """role -> position of its column, found by name in the header, or by number."""
    names = first if named else [str(place) for place in range(len(first))]
    places = {}
    for role, column in columns.items():
        if names.count(column) == 1:
            places[role] = names.index(column)
        elif column in names:
            raise UserError(f"{path}, line 1: task.columns.{role}: '{column}' names {names.count(column)} columns")
        elif role not in optional:
            raise _missing_column(path, 1, role, column, names)
    return places


def _json_rows(path: Path, columns: Mapping[str, str], optional: set[str]) -> Iterator[Row]:
    with _open(path) as file:
        for number, line in enumerate(_text_lines(path, file), start=1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON: {error.msg} (column {error.colno})") from None
            if not isinstance(found, dict):
                raise UserError(f"{path}, line {number}: expected a JSON object, found {line.strip()[:80]}")
            values = {}
            for role, column in columns.items():
                if column in found:
                    values[role] = _json_text(path, number, role, column, found[column])
                elif role not in optional:
                    raise _missing_column(path, number, role, column, list(found))
            yield Row(number, values)


def _json_text(path: Path, line: int, role: str, column: str, value: object) -> str:
    """Text; for a label also a whole number or true/false, and null, which is no label."""
    if isinstance(value, str):
        return value
    if role == "label" and (value is None or isinstance(value, int)):
        return "" if value is None else json.dumps(value)
    raise UserError(
        f"{path}, line {line}, '{column}': expected text, found {json.dumps(value, ensure_ascii=False)[:80]}"
    )


def _missing_column(path: Path, line: int, role: str, column: str, found: list[str]) -> UserError:
    return UserError(
        f"{path}, line {line}: task.columns.{role}: no column '{column}'; columns found: {', '.join(found)}"
    )


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    try:
        return gzip.open(path) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _text_lines(path: Path, file: Iterable[bytes]) -> Iterator[str]:
    """The lines of a UTF-8 file without its byte order mark, decoded one by one: a bad byte has a line number."""
    try:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not UTF-8 text ({error.reason} at byte {error.start})"
                ) from None
    except (OSError, EOFError, zlib.error) as error:  # a gzip file that is none, or ends too early
        raise UserError(f"cannot read {path}: {error}") from None
