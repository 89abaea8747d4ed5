"""Read the rows of a task from CSV, TSV and JSONL files."""

import gzip
import json
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from experiment.csv_and_jsonl import (
    CsvFormat,
    column_index,
    missing_column,
    not_text,
    read_csv,
    read_json_lines,
    text_lines,
)
from experiment.errors import UserError

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}


@dataclass(frozen=True)
class Row:
    line: int  # of the file, from 1
    values: Mapping[str, str]  # role (text, text_pair, label) -> the cell


@dataclass(frozen=True)
class TaskTable:
    path: Path
    rows: tuple[Row, ...]
    labelled: bool  # whether the rows have the role "label"


def read_table(
    path: Path, columns: Mapping[str, str], csv_format: CsvFormat | None = None, label_required: bool = True
) -> TaskTable:
    """Read the rows of a .csv, .tsv, .txt or .jsonl file, perhaps compressed (.gz).

    Labels are stripped, text is not.

    columns: name of the column for each role: text, text_pair, label. csv_format: default: the separator that the file
    name suggests, with a header. label_required: whether to reject a file whose label column is missing or empty.

    Raises UserError with file and line.
    """
    optional = () if label_required else ("label",)
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind == ".jsonl":
        rows = list(_json_rows(path, columns, optional))
    elif kind in _SEPARATORS:
        csv_format = csv_format or CsvFormat()
        csv_format = replace(csv_format, separator=csv_format.separator or _SEPARATORS[kind])
        rows = list(_csv_rows(path, columns, optional, csv_format))
    else:
        raise UserError(f"{path}: expected a file that ends in .csv, .tsv, .txt or .jsonl (or one of these and .gz)")
    if not rows:
        raise UserError(f"{path} has no rows")
    return _check_labels(path, rows, label_required)


def _check_labels(path: Path, rows: list[Row], label_required: bool) -> TaskTable:
    rows = [
        Row(row.line, {**row.values, "label": row.values["label"].strip()} if "label" in row.values else row.values)
        for row in rows
    ]
    labelled = any(row.values.get("label") for row in rows)
    unlabelled = [row.line for row in rows if not row.values.get("label")]
    if unlabelled and (label_required or labelled):
        more = f" (and {len(unlabelled) - 1} more lines)" if len(unlabelled) > 1 else ""
        raise UserError(f"{path}:{unlabelled[0]}{more}: the label is empty")
    if not labelled:
        rows = [Row(row.line, {role: text for role, text in row.values.items() if role != "label"}) for row in rows]
    return TaskTable(path, tuple(rows), labelled)


def _csv_rows(
    path: Path, columns: Mapping[str, str], optional: Collection[str], csv_format: CsvFormat
) -> Iterator[Row]:
    with _open(path) as file:
        names, rows = read_csv(text_lines(file, str(path)), str(path), csv_format)
        if not names:
            return
        indices = {
            role: column_index(names, column, f"{path}:1", f"task.columns.{role}")
            for role, column in columns.items()
            if column in names or role not in optional
        }
        for line, cells in rows:
            yield Row(line, {role: cells[index] for role, index in indices.items()})


def _json_rows(path: Path, columns: Mapping[str, str], optional: Collection[str]) -> Iterator[Row]:
    with _open(path) as file:
        for line, found in read_json_lines(text_lines(file, str(path)), str(path)):
            values = {}
            for role, column in columns.items():
                if column in found:
                    values[role] = _json_text(f"{path}:{line}", role, column, found[column])
                elif role not in optional:
                    raise missing_column(f"{path}:{line}", column, found, f"task.columns.{role}")
            yield Row(line, values)


def _json_text(place: str, role: str, column: str, value: object) -> str:
    """Text; for a label also a whole number, true, false, or null for no label."""
    if isinstance(value, str):
        return value
    if role == "label" and (value is None or isinstance(value, int)):
        return "" if value is None else json.dumps(value)
    raise not_text(place, column, value)


@contextmanager
def _open(path: Path) -> Iterator[Iterable[bytes]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:  # also a .gz file that is damaged or not compressed
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
