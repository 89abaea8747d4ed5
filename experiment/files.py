"""Files on disk: atomic writes, fsync, JSON, text and checksums."""

import codecs
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import xxhash

from experiment.errors import UserError, reason
from experiment.file_locks import is_path_locked

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

REPOSITORY = Path(__file__).resolve().parents[1]
"""The folder of our packages: a clone, or where pip has installed them."""

PACKAGES = ("launcher", "pretrain", "finetune", "experiment")

_LEFT_SECONDS = 3600.0  # launches and preflight use a folder for less
_UNLOCKED_SECONDS = 10.0  # between a folder and its lock
_CHECKSUM_BYTES = 2**20  # read at once
_MAX_DIGITS = 4300  # Python refuses to read longer whole numbers


_of_thread = threading.local()  # on_sync: called after each sync of the thread


@contextmanager
def created_parents(path: Path) -> Iterator[None]:
    """Create the missing folders above `path`, and remove empty ones when the block ends. Raises OSError."""
    missing = list(takewhile(lambda folder: not folder.exists(), path.absolute().parents))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def atomic_write(path: Path, durable: bool = True) -> Iterator[Path]:
    """Replace the file `path` by the temporary file that the block writes, whose path this yields.

    After a crash or a power cut, `path` holds the old content or the new, never a part of it. Missing folders are
    created. If the block raises, `path` stays as it was; an OSError of the write names `path`. Without `durable` it
    does not wait for the disk: after a power cut, `path` may be damaged.
    """
    # The folder may be shared by hosts.
    temporary = path.with_name(f".{path.name}.{platform.node()}.{threading.get_native_id()}")
    with created_parents(path):
        try:
            yield temporary
            if durable:
                fsync(temporary)
            temporary.replace(path)
        except BaseException as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename in (None, str(temporary)):
                error.filename = str(path)
            raise
    if durable:
        with suppress(OSError):  # it may not be readable
            fsync(path.parent)


def remove_unfinished(folder: Path, name: str = "*") -> None:
    """Remove temporary files of `atomic_write` in this folder whose threads, on this machine, have ended. name: pattern
    of the names of their files; without it, for folders that nobody else writes to."""
    for path in folder.glob(f".{name}.{platform.node()}.*"):
        if not Path("/proc", path.suffix[1:]).exists():
            with suppress(OSError):
                path.unlink()


@contextmanager
def removed_on_error(folder: Path) -> Iterator[None]:
    """Remove the folder that the block writes if it raises: the disk may be full."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def temporary_folder(parent: Path, prefix: str, mode: int = 0o700) -> Iterator[Path]:
    """Make a folder with this prefix in `parent`, and remove it at the end of the block.

    If the process is killed, a later call removes the folder: on the same machine after some seconds, because it sees
    that the folder is not locked any more, and elsewhere after an hour.
    """
    ours = f"{prefix}{platform.node()}-"
    folder = parent / f"{ours}{os.urandom(8).hex()}"
    folder.mkdir(mode=mode)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a network disk without locks for folders: nobody else gets one either
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # another call may hold it for a moment, to see whether it is free
        now = folder.stat().st_mtime  # by the clock of the disk
        for left in parent.glob(f"{prefix}*"):
            with suppress(OSError):  # removed meanwhile
                if left.stat().st_uid == os.getuid() and _is_left(left, now, left.name.startswith(ours)):
                    shutil.rmtree(left, ignore_errors=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _is_left(folder: Path, now: float, made_here: bool) -> bool:
    """Return whether the process that made the folder has ended."""
    age, locked = now - folder.stat().st_mtime, is_path_locked(folder)
    return not locked and age > (_UNLOCKED_SECONDS if made_here and locked is not None else _LEFT_SECONDS)


def write_file(path: Path, content: bytes) -> None:
    """Replace a file atomically, see `atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str, durable: bool = True) -> None:
    """Replace a text file atomically, see `atomic_write`."""
    with atomic_write(path, durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int = 2, durable: bool = True) -> None:
    """Replace a JSON file atomically, see `atomic_write`."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n", durable)


def create_json(path: Path, value: Any) -> None:
    """Write a JSON file unless it exists. Of several processes, on any host, the first one writes it."""
    temporary = path.with_name(f".{path.name}.{platform.node()}.{threading.get_native_id()}.new")
    write_json(temporary, value)
    try:
        os.link(temporary, path)  # atomic on shared disks too
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_text(path: Path, what: str) -> str:
    """Return the lines of a UTF-8 file, without a byte order mark. Raises UserError that calls it `what`."""
    try:
        raw = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror or error}") from None
    return "\n".join(text_lines(raw, f"{what} {path}"))


def read_items(path: Path | str, key: str) -> list[tuple[int, str]]:
    """Return (line number, item) of each line that is not empty, without spaces around it.

    key: of the file, for messages. Raises UserError if it cannot be read.
    """
    try:
        raw = Path(path).read_bytes().splitlines()  # of bytes: at "\n", "\r\n" and "\r" only
    except OSError as error:
        raise UserError(f"{key}: cannot read {path}: {reason(error)}") from None
    lines = text_lines(raw, f"{key}: {path}")
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


def text_lines(
    lines: Iterable[bytes], origin: str, first: int = 1, on_invalid: Callable[[int, UserError], None] | None = None
) -> Iterator[str]:
    """Decode the lines of a UTF-8 file. They keep their line ends, but not a byte order mark.

    first: number of the first line. on_invalid: called for a line with bytes that are not UTF-8, with its number and
    the error to raise; if it returns, they become U+FFFD.
    """
    for number, raw in enumerate(lines, first):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            if number == 1 and raw.startswith(b"PK\x03\x04"):
                raise UserError(
                    f"{origin}: a ZIP archive, such as a workbook of Excel; save the sheet as CSV UTF-8"
                ) from None
            if number == 1 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UserError(
                    f"{origin}: UTF-16 text; convert the file first, for instance with iconv -f UTF-16 -t UTF-8"
                ) from None
            problem = f"{origin}:{number}: not UTF-8 text (byte 0x{raw[error.start]:02x} at column {error.start + 1})"
            advice = "for instance with iconv -f ENCODING -t UTF-8; Chinese may be GB18030 or BIG5"
            refusal = UserError(f"{problem}; convert the file first, {advice}")
            if on_invalid is None:
                raise refusal from None
            on_invalid(number, refusal)
            line = raw.decode("utf-8", "replace")
        yield line.removeprefix("\ufeff") if number == 1 else line


def is_unicode(value: Any) -> bool:
    """Return whether all texts are free of halves of surrogate pairs, which tokenizers and files refuse: JSON may
    escape them, and Python writes bytes of a file name that are not UTF-8 with them."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
    parts = (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(map(is_unicode, parts))


def check_name(name: str) -> None:
    """Raise UserError for a name of bytes that are not UTF-8, which neither text files nor pages can hold."""
    if not is_unicode(name):
        raise UserError(f"{os.fsencode(name)!r} is not UTF-8, as names of files and other arguments have to be")


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError with one line, also for a key that an object has twice, of
    which Python keeps the last, for a whole number of more than 4300 digits, and for nesting that is too deep."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_int=_whole_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    """Return the value of a JSON file. Raises OSError, and ValueError as `parse_json`."""
    with named_errors(path):
        return parse_json(path.read_text(encoding="utf-8"))


def parse_record(kind: type[T], text: str | bytes) -> T:
    """Parse a JSON text as a value of this type. Unknown keys are ignored. Raises ValueError."""
    found: T = _adapter(kind).validate_json(text)  # type: ignore[arg-type]  # to mypy, classes are not hashable
    return found


def parse_records(kind: type[T], lines: bytes) -> list[T]:
    """Return the lines of a file of records, as `parse_record`; without damaged ones, such as one that was cut off."""
    found = []
    for line in lines.split(b"\n"):  # not splitlines, which also splits at U+2028 and others
        with suppress(ValueError):
            found.append(parse_record(kind, line))
    return found


@cache
def _adapter(kind: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter  # host guards import this module and read no records

    return TypeAdapter(kind)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} appears twice in an object")
    return found


def _whole_number(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"the number {digits[:12]}… has {len(digits):,} digits, more than {_MAX_DIGITS:,}")
    return int(digits)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Add the name of a file to an OSError of the block that has none: only opening a file gives it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def fsync(*paths: Path) -> None:
    """Wait until the contents of these files, or the entries of these folders, are on disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            sync(descriptor)
        except OSError as error:  # some network file systems cannot sync a folder
            if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
                error.filename = str(path)
                raise
        finally:
            os.close(descriptor)


def sync(descriptor: int) -> None:
    """Wait until an open file or folder is on disk."""
    os.fsync(descriptor)
    if on_sync := getattr(_of_thread, "on_sync", None):
        on_sync()


def call_after_syncs(function: Callable[[], None]) -> None:
    """Call `function` each time this thread has synced a file or folder: progress, however slow the disk is."""
    _of_thread.on_sync = function


def fsync_tree(folder: Path, on_progress: Callable[[], None] = lambda: None) -> None:
    """Wait until a folder and everything in it are on disk. Calls `on_progress` after each file and folder."""
    for path in (*paths_below(folder), folder):
        fsync(path)
        on_progress()


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder, sorted; empty if there is no such folder. Raises OSError, unlike `Path.glob`."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return sorted(os.listdir(folder))  # noqa: PTH208  (names are enough)
    return []


def exists_uncached(path: Path) -> bool:
    """Return whether the file exists. Raises OSError.

    A network file system may answer `Path.exists` from a cache, for a minute after another machine has created the
    file. Listing the folder asks the server.
    """
    return path.name in names_in(path.parent) and path.exists()


def check_relative(name: str) -> None:
    """Raise UserError for the name of a file in a folder that leads out of the folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"'{name}' is not in this folder")


def paths_below(folder: Path) -> list[Path]:
    """Return everything in a folder and its subfolders, sorted. Raises OSError, unlike `Path.rglob`."""

    def fail(error: OSError) -> None:
        raise error

    walk = os.walk(folder, onerror=fail)
    return sorted(Path(parent, name) for parent, folders, files in walk for name in (*folders, *files))


def sha256(path: Path) -> str:
    with named_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """Return the first 32 hexadecimal digits of the SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:32]


def checksum(path: Path, on_progress: Callable[[], None] = lambda: None) -> str:
    """Return the hexadecimal XXH3-128 of a file: detects damage, far faster than SHA-256, but not secure against
    forgery. Calls `on_progress` after each part."""
    digest, part = xxhash.xxh3_128(), memoryview(bytearray(_CHECKSUM_BYTES))
    with named_errors(path), path.open("rb", buffering=0) as file:
        while size := file.readinto(part):
            digest.update(part[:size])
            on_progress()
    return digest.hexdigest()


def cache_folder() -> Path:
    """Return the folder of files that deepcloze may delete and make again: `deepcloze` in XDG_CACHE_HOME, by default
    `~/.cache`. It may not exist, nor be writable."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 (never raises)
    return Path(home) / "deepcloze"
