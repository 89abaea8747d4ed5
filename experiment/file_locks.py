"""Locks of files and folders, which end with the process that holds them."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_POLL_SECONDS = 0.1


def is_path_locked(path: Path) -> bool | None:
    """Return whether a process has locked a file or folder, such as a `temporary_folder`; False if there is none, None
    if the disk cannot tell."""
    try:
        descriptor = open_for_lock(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return None
    try:
        locked = try_lock(descriptor)
    finally:
        os.close(descriptor)
    return None if locked is None else not locked


def open_for_lock(path: Path) -> int:
    """Open a file or folder for `try_lock`. Raises OSError."""
    try:
        return os.open(path, os.O_RDWR)  # NFS needs write access
    except OSError:  # a folder, read-only, or of another user
        return os.open(path, os.O_RDONLY)


def try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool | None:
    """Lock an open file or folder. Returns False if another process has locked it, None if the disk cannot tell, as
    Lustre without `-o flock`."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter on some disks
        return False
    except OSError:
        return None
    return True


@contextmanager
def opened_lock(path: Path) -> Iterator[Callable[[float], bool | None]]:
    """Yield a function that locks the file `path`, as `try_lock`, until the block or this process ends. Its argument:
    seconds to wait for another process. The file is created; raises OSError."""
    with path.open("ab") as file:

        def lock(seconds: float) -> bool | None:
            end = time.monotonic() + seconds
            while (locked := try_lock(file.fileno())) is False and time.monotonic() < end:
                time.sleep(_POLL_SECONDS)
            return locked and os.fstat(file.fileno()).st_nlink > 0  # False: another process has removed it meanwhile

        try:
            yield lock
        finally:
            with suppress(OSError):  # forked processes may have it open
                fcntl.flock(file, fcntl.LOCK_UN)
