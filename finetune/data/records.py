"""Read the rows of a split from CSV, TSV and JSONL files, and their cells as the columns of the task declare."""

import gzip
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from finetune.data.columns import CellType, Columns

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}


@dataclass(frozen=True)
class Record:
    """One row of a split: what a task predicts something for."""

    place: str  # file and line, for messages
    values: Mapping[str, Any]  # role -> value; the target is absent if the split has none


@dataclass(frozen=True)
class Table:
    """The rows of a split, in order."""

    path: Path
    records: tuple[Record, ...]
    labelled: bool  # whether the records have their targets

    def __len__(self) -> int:
        return len(self.records)


def read_table(
    path: Path, columns: Columns, csv_format: CsvFormat | None = None, targets_required: bool = True
) -> Table:
    """Read the rows of a .csv, .tsv, .txt or .jsonl file, perhaps compressed (.gz).

    csv_format: default: the separator that the file name suggests, with a header. targets_required: whether to reject
    a file in which the column of a target is missing or empty.

    Raises UserError with file and line.
    """
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind == ".jsonl":
        records = list(_json_records(path, columns, targets_required))
    elif kind in _SEPARATORS:
        csv_format = csv_format or CsvFormat()
        csv_format = replace(csv_format, separator=csv_format.separator or _SEPARATORS[kind])
        records = list(_csv_records(path, columns, targets_required, csv_format))
    else:
        raise UserError(f"{path}: expected a file that ends in .csv, .tsv, .txt or .jsonl (or one of these and .gz)")
    if not records:
        raise UserError(f"{path} has no rows")
    return _check_targets(path, records, columns.cell_types(), targets_required)


def _check_targets(path: Path, records: list[Record], types: Mapping[str, CellType], required: bool) -> Table:
    """A table in which all records have their targets or none has."""
    targets = [role for role, cell_type in types.items() if cell_type.target]
    labelled = any(record.values.get(role) is not None for record in records for role in targets)
    for role in targets:
        empty = [record.place for record in records if record.values.get(role) is None]
        if empty and (required or labelled):
            more = f" (and {len(empty) - 1} more lines)" if len(empty) > 1 else ""
            raise UserError(f"{empty[0]}{more}: the {role} is empty")
    if not labelled:
        records = [
            replace(record, values={role: value for role, value in record.values.items() if role not in targets})
            for record in records
        ]
    return Table(path, tuple(records), labelled)


def _csv_records(path: Path, columns: Columns, targets_required: bool, csv_format: CsvFormat) -> Iterator[Record]:
    types = columns.cell_types()
    with _open(path) as file:
        names, rows = read_csv(text_lines(file, str(path)), str(path), csv_format)
        if not names:
            return
        indices = {
            role: column_index(names, column, f"{path}:1", f"task.columns.{role}")
            for role, cell_type in types.items()
            if (column := getattr(columns, role)) in names or targets_required or not cell_type.target
        }
        for line, cells in rows:
            place = f"{path}:{line}"
            yield Record(place, {role: types[role].read(cells[index]) for role, index in indices.items()})


def _json_records(path: Path, columns: Columns, targets_required: bool) -> Iterator[Record]:
    types = columns.cell_types()
    with _open(path) as file:
        for line, found in read_json_lines(text_lines(file, str(path)), str(path)):
            place, values = f"{path}:{line}", {}
            for role, cell_type in types.items():
                column = getattr(columns, role)
                if column in found:
                    values[role] = _read_cell(place, cell_type, column, found[column])
                elif targets_required or not cell_type.target:
                    raise missing_column(place, column, found, f"task.columns.{role}")
            yield Record(place, values)


def _read_cell(place: str, cell_type: CellType, column: str, cell: object) -> Any:
    try:
        return cell_type.read(cell)
    except ValueError:
        raise not_text(place, column, cell) from None


@contextmanager
def _open(path: Path) -> Iterator[Iterable[bytes]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:  # also a .gz file that is damaged or not compressed
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
