"""Arrays over the documents of a collection, and their parts in files."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class StoredArray:
    """An array in a .npy file, which is open only while rows are read: there may be more parts than a process may have
    open files or memory maps."""

    def __init__(self, path: Path) -> None:
        mapped = np.load(path, mmap_mode="r")
        self._path, self._offset = path, mapped.offset
        self._shape, self._dtype = mapped.shape, mapped.dtype

    def __len__(self) -> int:
        return int(self._shape[0])

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        start, stop, _ = rows.indices(len(self))
        row_bytes = math.prod(self._shape[1:]) * self._dtype.itemsize
        with self._path.open("rb") as file:  # in half the time of np.fromfile, for a few rows
            file.seek(self._offset + start * row_bytes)
            values = np.frombuffer(file.read((stop - start) * row_bytes), self._dtype)
        return values.reshape(stop - start, *self._shape[1:])


def split_by_part(values: NDArray[Any], counts: Sequence[int]) -> list[NDArray[Any]]:
    """Divide an array over all parts into one for each part."""
    return np.split(values, np.cumsum(counts)[:-1])


def is_first(ordered: NDArray[Any]) -> NDArray[np.bool_]:
    """Return whether each value is the first of those that equal it. ordered: equal values are neighbours; [N] or
    [N, K]."""
    differs = np.ones(len(ordered), bool)
    differs[1:] = (ordered[1:] != ordered[:-1]).any(axis=tuple(range(1, ordered.ndim)))
    return differs


def first_of_equal(ordered: NDArray[Any]) -> NDArray[np.int64]:
    """Return the place of the first of the equal values that each value is one of. ordered: as of `is_first`."""
    return np.maximum.accumulate(np.where(is_first(ordered), np.arange(len(ordered)), 0))
