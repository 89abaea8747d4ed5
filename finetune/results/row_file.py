"""Write rows to a file whose name says in which format: .csv, .tsv, .jsonl or .parquet.

Cells are written as they are, also those that begin with `=`, `+`, `-` or `@`, which spreadsheets run as formulas: a
file is read again by programs, and what escapes a formula would also change texts and negative numbers.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from experiment.errors import UserError
from experiment.files import atomic_write

Rows = Sequence[Mapping[str, Any]]
"""Rows of the same columns. Values are as in JSON; in CSV and Parquet, lists and mappings become JSON texts."""

Write = Callable[[Rows], None]

_WAITING = 50_000  # rows of a Parquet file without a value in some column


def check_row_file(path: Path) -> None:
    """Raise UserError unless the name of a file says a format."""
    if path.suffix not in _FORMATS:
        raise UserError(f"{path}: expected a file that ends in {', '.join(_FORMATS)}")


@contextmanager
def open_row_file(path: Path) -> Iterator[Write]:
    """A function that adds rows to a new file. The file appears, or replaces another, when the block ends without an
    error."""
    check_row_file(path)
    with atomic_write(path) as temporary, _FORMATS[path.suffix](temporary) as write:
        yield write


def write_rows(path: Path, rows: Rows) -> None:
    """Write a whole file."""
    with open_row_file(path) as write:
        write(rows)


@contextmanager
def _delimited(path: Path, separator: str) -> Iterator[Write]:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        columns: list[str] = []

        def write(rows: Rows) -> None:
            if not columns and rows:
                columns.extend(rows[0])
                writer.writerow(columns)
            writer.writerows([_cell(row[column]) for column in columns] for row in rows)

        yield write


@contextmanager
def _json_lines(path: Path) -> Iterator[Write]:
    with path.open("w", encoding="utf-8") as file:
        yield lambda rows: file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


@contextmanager
def _parquet(path: Path) -> Iterator[Write]:
    import pyarrow
    from pyarrow import parquet

    arrow = {bool: pyarrow.bool_(), int: pyarrow.int64(), float: pyarrow.float64()}
    types: dict[str, Any] = {}  # of the columns that have had a value
    waiting: list[Mapping[str, Any]] = []  # until all columns have a type; the others become texts
    writer: Any = None

    def flush() -> None:
        nonlocal writer
        if writer is None:
            fields = [(column, types.get(column, pyarrow.string())) for column in waiting[0]]
            writer = parquet.ParquetWriter(path, pyarrow.schema(fields))
        texts = {field.name for field in writer.schema if field.type == pyarrow.string()}
        cells = [
            {column: _text(value) if column in texts else _cell(value) for column, value in row.items()}
            for row in waiting
        ]
        writer.write_table(pyarrow.Table.from_pylist(cells, schema=writer.schema))
        waiting.clear()

    def write(rows: Rows) -> None:
        waiting.extend(rows)
        for row in rows if writer is None else ():
            found = {column: value for column, value in row.items() if column not in types and value is not None}
            types.update({column: arrow.get(type(value), pyarrow.string()) for column, value in found.items()})
        if waiting and (len(types) == len(waiting[0]) or len(waiting) >= _WAITING):
            flush()

    try:
        yield write
        if waiting:
            flush()
    finally:
        if writer is not None:
            writer.close()


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | tuple | dict) else value


_FORMATS: dict[str, Callable[[Path], AbstractContextManager[Write]]] = {
    ".csv": partial(_delimited, separator=","),
    ".tsv": partial(_delimited, separator="\t"),
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
