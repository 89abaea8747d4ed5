"""Read the rows of a Parquet file, a few at a time."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

_ROWS = 64  # decoded at once; a file of a kilobyte may repeat a text of a megabyte in each row


def parquet_rows(
    file: "ParquetFile", columns: Sequence[str] | None = None, row_groups: Sequence[int] | None = None
) -> Iterator[tuple[Any, ...]]:
    """Yield the cells of each row. columns, row_groups: default: all."""
    for batch in file.iter_batches(_ROWS, row_groups=row_groups, columns=columns):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
