"""The rows of a data file: cells with names, as the format of the file has them."""

import gzip
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from experiment.csv_and_jsonl import CsvFormat, read_csv, read_json_lines, text_lines
from experiment.errors import UserError

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}


class Row(NamedTuple):
    """One row."""

    place: str  # file and line, for messages
    names: Sequence[str]  # of its cells
    cells: Sequence[object]
    named_at: str  # where the names are, such as the header


def read_rows(path: Path, csv_format: CsvFormat) -> Iterator[Row]:
    """The rows of a .csv, .tsv, .txt or .jsonl file, perhaps compressed (.gz). Raises UserError with file and line.

    csv_format: if it has no separator, the file name suggests one.
    """
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix == ".jsonl":
        return _json_lines_rows(path)
    if suffix in _SEPARATORS:
        return _csv_rows(path, replace(csv_format, separator=csv_format.separator or _SEPARATORS[suffix]))
    raise UserError(f"{path}: expected a file that ends in .csv, .tsv, .txt or .jsonl (or one of these and .gz)")


def _csv_rows(path: Path, csv_format: CsvFormat) -> Iterator[Row]:
    with _open(path) as file:
        names, rows = read_csv(text_lines(file, str(path)), str(path), csv_format)
        for line, cells in rows:
            yield Row(f"{path}:{line}", names, cells, f"{path}:1")


def _json_lines_rows(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        for line, cells in read_json_lines(text_lines(file, str(path)), str(path)):
            place = f"{path}:{line}"
            yield Row(place, list(cells), list(cells.values()), place)


@contextmanager
def _open(path: Path) -> Iterator[Iterable[bytes]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:  # also a .gz file that is damaged or not compressed
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
