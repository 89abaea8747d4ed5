"""Exceptions that end a command without being a bug, messages to the user, and errors of disks."""

import errno
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from tempfile import gettempdir

from experiment.formatting import shorten

log = logging.getLogger(__name__)

DENIED = {errno.EACCES, errno.EPERM}
_DAMAGE_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
_FULL = {errno.ENOSPC: "disk full", errno.EDQUOT: "disk full (quota exceeded)"}
_OF_NETWORKS = {errno.ECOMM, errno.EHOSTDOWN, errno.ENOTCONN, errno.EREMOTEIO, errno.ESHUTDOWN, errno.ETIMEDOUT}
_MAY_PASS = {*_FULL, *_OF_NETWORKS, errno.EIO, errno.ESTALE}
# Only a disk gives these. The others count only with the name of a file: sockets time out, and a process may not be
# signalled either.
_OF_DISKS_ONLY = {*_MAY_PASS - _OF_NETWORKS, errno.EFBIG, errno.ENOLCK, errno.EROFS}
_REFUSALS = {
    *(*_MAY_PASS, *_OF_DISKS_ONLY, errno.EACCES, errno.EBUSY, errno.EEXIST),
    *(errno.EISDIR, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ENOTEMPTY, errno.EPERM),
}
# torch's allocator on a CPU; oneDNN, which gives no reason; its mapping of files; CUDA and Triton; cuBLAS; NCCL.
_OUT_OF_MEMORY = re.compile(
    "can't allocate memory|could not create a primitive(?! descriptor)|unable to mmap|Cannot allocate memory|"
    "out of memory|CUBLAS_STATUS_ALLOC_FAILED|Failed to CUDA calloc"
)
_QUOTED_BY_RUST = re.compile(r"\(os error (\d+)\)")  # safetensors and tokenizers raise no OSError
_CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # other than a tab and a line break
_QUOTED_BY_SHUTIL = re.compile(r"\[Errno (\d+)\]")


QUIET_VARIABLE = "DEEPCLOZE_QUIET"
"""Set for `--quiet`, also for the processes that a command starts: results, warnings and errors only."""


class UserError(ValueError):
    """A mistake of the user: bad input, a bad config, a missing file.

    The message is complete: it names the file, line or key, the value found and the expected one. `deepcloze` prints
    it to stderr without a traceback and exits 2.
    """


class HostError(UserError):
    """A disk or a GPU of this host does not work, but may later. Supervised ranks start again, on hosts that pass
    preflight."""


@contextmanager
def user_errors_in(where: str) -> Iterator[None]:
    """Put `where` and a colon before the message of a UserError that the block raises."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{where}: {error}") from None


def reason(error: Exception) -> str:
    """Return why a file cannot be read or written, without the number and path in the text of an OSError."""
    return getattr(error, "strerror", None) or first_line(error)  # pyarrow's may have several


def is_damage(error: Exception) -> bool:
    """Return whether a file is missing or has other content, as opposed to temporarily unreadable."""
    return not isinstance(error, OSError) or error.errno in _DAMAGE_ERRNOS


def require_damage(error: Exception, problem: str, advice: str = "Try again") -> None:
    """Raise UserError, a HostError with `advice` if it may pass, for a file that may be undamaged."""
    if isinstance(error, OSError) and error.errno in DENIED:
        raise UserError(f"{problem}: {reason(error)}")
    if not is_damage(error):
        raise HostError(f"{problem}: {reason(error)}. {advice}")


def first_line(error: BaseException) -> str:
    """Return an error's first line, and the second if the first announces it; its type if it has no message."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first


class AgreedFailureError(Exception):
    """The run cannot continue. All ranks raise it in the same step; the message is for the user."""


class StoppedError(Exception):
    """The run was stopped early and can be resumed (signal, STOP file, time limit). `deepcloze` exits 75."""


def notify(message: str, bar_rows: int = 0) -> None:
    """Print a message for the user to stderr.

    bar_rows: of a progress bar that another process may show on the same terminal. The message then begins a new line,
    since the last one may have the bar or ^C, and is followed by empty ones, which the bar erases in its place. All is
    one write, so that the bar is not drawn in between. Handlers of signals may call it.
    """
    with suppress(OSError):  # the terminal may be closed
        before, after = ("\n", "\n" * (bar_rows - 1)) if bar_rows and sys.stderr.isatty() else ("", "")
        text = f"{before}deepcloze: {escape_controls(message)}\n{after}"
        try:
            print(text, end="", file=sys.stderr, flush=True)
        except RuntimeError:  # a handler interrupted a write to stderr, which cannot be re-entered
            os.write(sys.stderr.fileno(), text.encode(sys.stderr.encoding, "backslashreplace"))


def inform(message: str) -> None:
    """Print a message about normal progress with `notify`, unless `--quiet` is set."""
    if not is_quiet():
        notify(message)


def is_quiet() -> bool:
    return QUIET_VARIABLE in os.environ


@cache
def warn_once(message: str) -> None:
    """Log a warning, once in each command: some commands read files or choose a device several times."""
    log.warning("%s", escape_controls(message))


def escape_controls(message: str) -> str:
    """Escape control characters, such as from a quoted file, which would change the terminal."""
    return _CONTROL_CHARACTER.sub(lambda found: f"\\x{ord(found[0]):02x}", message)


def end_line() -> None:
    """Begin a new line on a terminal, whose last line may have a progress bar or ^C."""
    with suppress(OSError):
        if sys.stderr.isatty():
            print(file=sys.stderr, flush=True)


def describe_disk_error(error: BaseException) -> str | None:
    """Return the error of a disk, or of the folder for temporary files, with the file if it is known; None for an error
    of another kind."""
    if isinstance(error, FileNotFoundError) and "No usable temporary directory" in str(error):  # of tempfile
        return "no folder for temporary files can be written, such as /tmp; set TMPDIR to one"
    if isinstance(error, OSError) and str(error) == "AF_UNIX path too long":  # of multiprocessing, which adds 32 bytes
        return f"the path of the folder for temporary files is too long ({gettempdir()}); set TMPDIR to a shorter one"
    if (number := _errno(error)) not in _REFUSALS:
        return None
    log.debug("the disk refused:", exc_info=error)
    reason = _FULL.get(number) or os.strerror(number)
    file = getattr(error, "filename2", None) or getattr(error, "filename", None)  # of a rename: its target
    return f"{file}: {reason}" if file else reason


@contextmanager
def readable_disk_errors(where: str = "", advice: str = "", writes: bool = False) -> Iterator[None]:
    """Raise UserError in place of an error of the disk. `where` and `advice` go before and after its message.

    writes: whether a missing file is one that could not be created, as in /proc, and not a bug.
    """
    try:
        yield
    except Exception as error:
        line = describe_disk_error(error)
        if line is None and writes and isinstance(error, FileNotFoundError):
            line = f"{error.filename}: {error.strerror}"
        if line is None:
            raise
        raise UserError(f"{where}{line}{advice}") from None


@contextmanager
def stopped_by_disk_errors(where: str) -> Iterator[None]:
    """Raise StoppedError in place of an error of the disk that may pass, such as a full one: the same command resumes.
    UserError in place of the others: it would fail again. `where` goes before the message."""
    with readable_disk_errors(where):
        try:
            yield
        except Exception as error:
            if may_pass(error):
                raise StoppedError(f"{where}{describe_disk_error(error)}; the same command resumes") from None
            raise


def may_pass(error: BaseException) -> bool:
    """Return whether it is an error of a disk that may work later."""
    return _errno(error) in _MAY_PASS


def _errno(error: BaseException) -> int | None:
    """Return the system's number for an error that a disk may have given."""
    if isinstance(error, UserError | StoppedError):  # has a message of its own
        return None
    if isinstance(error, OSError) and not isinstance(error, shutil.Error):
        return error.errno if error.filename is not None or error.errno in _OF_DISKS_ONLY else None
    quoted = _QUOTED_BY_SHUTIL if isinstance(error, shutil.Error) else _QUOTED_BY_RUST
    found = quoted.search(str(error))
    number = int(found[1]) if found else None
    return None if quoted is _QUOTED_BY_RUST and number in _OF_NETWORKS else number


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the memory of a device, or of the host, does not suffice. For the host torch has no type."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None)
    )


def describe_lack_of_memory(error: BaseException) -> str | None:
    """Return a message if `is_out_of_memory`; None for an error of another kind."""
    if not is_out_of_memory(error):
        return None
    advice = "; other programs may use the GPU, see nvidia-smi" if "CUDA" in str(error) else ""
    cause = f" ({shorten(first_line(error), 300)})" if str(error) else ""
    return f"memory ran out{advice}{cause}"
