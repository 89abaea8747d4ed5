"""Parquet."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from experiment.errors import UserError
from finetune.data.formats.row import Row


def read_parquet(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file."""
    number = 0
    try:
        with path.open("rb") as stream, pyarrow.parquet.ParquetFile(stream) as file:
            names = file.schema_arrow.names
            for batch in file.iter_batches():
                for cells in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    number += 1
                    yield Row(f"{path}, row {number}", names, cells, str(path))
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
