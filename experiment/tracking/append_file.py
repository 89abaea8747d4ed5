"""A file to which whole records are appended, also if the disk is full for a while."""

import errno
import os
from contextlib import suppress
from pathlib import Path


class AppendFile:
    """Appends records to `path`: each is in the file when `append` returns, and no part of one stays there."""

    def __init__(self, path: Path) -> None:
        # Unbuffered: a record is in the file even if the process is killed right after.
        self._file = path.open("ab", buffering=0)
        self._end = self._file.tell()  # size of the file up to the last complete record
        self._torn = False  # whether a failed write may have left a part of a record after `_end`

    def append(self, record: bytes) -> None:
        """Raises OSError if the record does not fit."""
        self._remove_torn_record()
        self._torn = True
        if self._file.write(record) != len(record):
            with suppress(OSError):  # tried again before the next write
                self._remove_torn_record()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end += len(record)
        self._torn = False

    def close(self) -> None:
        with self._file:
            self._remove_torn_record()

    def _remove_torn_record(self) -> None:
        """The file is open for appending: the next write goes to its new end, wherever the last one stopped."""
        if self._torn:
            self._file.truncate(self._end)
            self._torn = False
