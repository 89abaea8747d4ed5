"""One row of a data file, and how its file is opened."""

import gzip
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from experiment.csv_and_jsonl import text_lines
from experiment.errors import UserError


class Row(NamedTuple):
    """One row: cells with names."""

    place: str  # file and line, for messages
    names: Sequence[str]  # of its cells
    cells: Sequence[object]
    named_at: str  # where the names are, such as the header
    numbered: bool = False  # whether a column may also be called by its number from 0


@contextmanager
def open_lines(path: Path) -> Iterator[Iterator[str]]:
    """The lines of a file, perhaps compressed (.gz). They end at "\\n", "\\r\\n" or "\\r". Raises UserError."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield text_lines((line for part in file for line in part.splitlines(keepends=True)), str(path))
    except (OSError, EOFError, zlib.error) as error:  # also a .gz file that is damaged or not compressed
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
