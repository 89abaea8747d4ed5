"""Read the rows of a Parquet file, a few at a time."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import IO, TYPE_CHECKING, Any

from experiment.errors import UserError

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile

_BUFFER = 1 << 20  # bytes of a column that are read at once
_ROWS = 64  # decoded at once; a file of a kilobyte may repeat a text of a megabyte in each row


class _Cells(Sequence[Any]):
    """The cells of a row. A column is converted when a cell of it is read: one that nobody reads may hold anything."""

    def __init__(self, convert: Callable[[int], list[Any]], index: int, length: int) -> None:
        self._convert, self._index, self._length = convert, index, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, column: Any) -> Any:
        return self._convert(range(self._length)[column])[self._index]


def open_parquet(stream: IO[bytes], whole_columns: bool = False) -> "ParquetFile":
    """Open a file for `parquet_rows`. whole_columns: read each column of a row group at once, which takes memory, but
    few requests to a server."""
    from pyarrow.parquet import ParquetFile

    return ParquetFile(stream, pre_buffer=whole_columns, buffer_size=_BUFFER)


def parquet_rows(
    file: "ParquetFile",
    place: Callable[[int], str],
    columns: Sequence[str] | None = None,
    row_groups: range | None = None,
) -> Iterator[tuple[int, Sequence[Any]]]:
    """Yield the number of each row, from 1, and its cells. Raises UserError if a column in `columns`, or one that is
    read, has a cell that Python cannot represent, such as a year after 9999.

    place: returns the file and a row, for messages. columns, row_groups: default: all.
    """
    groups = range(file.num_row_groups) if row_groups is None else row_groups
    first = 1 + sum(file.metadata.row_group(group).num_rows for group in range(groups.start))
    for batch in file.iter_batches(_ROWS, row_groups=list(groups), columns=columns):
        convert = cache(partial(_convert, batch, first, place))
        if columns is None:
            yield from ((first + index, _Cells(convert, index, batch.num_columns)) for index in range(batch.num_rows))
        else:
            yield from enumerate(zip(*map(convert, range(batch.num_columns)), strict=True), first)
        first += batch.num_rows


def _convert(batch: "RecordBatch", first: int, place: Callable[[int], str], column: int) -> list[Any]:
    """first: number of the first row of the batch."""
    cells: list[Any] = []
    try:
        cells.extend(cell.as_py() for cell in batch.column(column))
    except (ValueError, OverflowError, LookupError) as error:  # a date, text that is not UTF-8, a time zone
        name, problem = batch.schema.names[column], error.args[0] if isinstance(error, KeyError) else error
        raise UserError(f"{place(first + len(cells))}: cannot read '{name}': {problem}") from None
    return cells
