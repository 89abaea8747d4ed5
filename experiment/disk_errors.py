"""One line for what a disk refuses because it is full, read-only, broken or forbidden."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from experiment.errors import StoppedError, UserError

_FULL = {errno.ENOSPC: "disk full", errno.EDQUOT: "disk full (quota exceeded)"}
_REFUSALS = {
    *_FULL,
    errno.EACCES,
    errno.EFBIG,
    errno.EIO,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
    errno.ESTALE,
}
_QUOTED = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")


def describe_disk_error(error: BaseException) -> str | None:
    """What the disk refused, with the file if it is known; None for an error of another kind."""
    number = _errno(error)
    if number not in _REFUSALS:
        return None
    reason = _FULL.get(number) or os.strerror(number)
    file = getattr(error, "filename", None)
    return f"{file}: {reason}" if file else reason


@contextmanager
def disk_errors_as(error_type: type[Exception], where: str = "", advice: str = "") -> Iterator[None]:
    """Raise `error_type` in place of an error of the disk. `where` and `advice` go before and after its message."""
    try:
        yield
    except Exception as error:
        line = describe_disk_error(error)
        if line is None:
            raise
        raise error_type(f"{where}{line}{advice}") from None


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if isinstance(error, UserError | StoppedError):  # says itself what is wrong
        return None
    found = _QUOTED.search(str(error))  # by safetensors and tokenizers, which are written in Rust, and shutil.copytree
    return int(found[1] or found[2]) if found else None
