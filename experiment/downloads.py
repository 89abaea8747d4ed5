"""Copies of files and folders of object storage and web servers on a local disk."""

import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from experiment.errors import user_errors_in
from experiment.files import cache_folder, check_relative, json_digest
from experiment.progress import progress
from experiment.storage import DamagedError, StorageError, list_files, open_url

log = logging.getLogger(__name__)

_DOWNLOADS = 3  # of a file with a wrong checksum
_FILES_AT_ONCE = 8
_POLL_SECONDS = 0.5
_BUFFER = 1 << 20  # bytes


def local_folder(url: str, left_out: Collection[str]) -> Path:
    """Return a copy of a folder in the user's cache folder, which is made unless there is one of the same files.

    `left_out`: suffixes of files that are not copied. Raises StorageError.
    """
    found = list_files(url)
    if url.rstrip("/") in found:
        raise StorageError(f"{url} is a file; expected a folder")
    files = {name: info for name, info in found.items() if not name.endswith(tuple(left_out))}
    folder = cache_folder() / "folders" / json_digest([url, *files.items()])[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        missing = []
        for name, info in files.items():
            relative = name.removeprefix(url.rstrip("/")).lstrip("/")
            with user_errors_in(url):
                check_relative(relative)
            if not (path := folder / "files" / relative).exists():
                missing.append(Download(name, path, info.size))
        if missing:
            download_files(missing, f"copying {url}")
    return folder / "files"


class Download(NamedTuple):
    """A file to copy."""

    url: str
    path: Path  # of the copy
    size: int  # expected, in bytes
    checksum: str | None = None  # expected, in hexadecimal


def download_files(
    files: Sequence[Download],
    label: str,
    algorithm: Callable[[], Any] = hashlib.sha256,
    on_progress: Callable[[], None] = lambda: None,
    show_progress: bool = True,
) -> None:
    """Copy several files at once, see `download`, and show the progress.

    `on_progress` is called in this thread, only if something has been copied since the last call.
    """
    counts, is_ending = deque[int](), threading.Event()  # bytes

    def count(size: int) -> None:
        if is_ending.is_set():  # a file of gigabytes would hold up Ctrl-C
            raise CancelledError
        counts.append(size)

    bar = progress(label, sum(file.size for file in files) / 1e6, "MB", show_progress)
    with bar as advance, ThreadPoolExecutor(_FILES_AT_ONCE, "download") as pool:
        running = {pool.submit(download, file, algorithm, count) for file in files}
        try:
            while running:
                done, running = wait(running, _POLL_SECONDS)
                if counts:
                    on_progress()
                    advance(sum(counts.popleft() for _ in range(len(counts))) / 1e6)
                for future in done:
                    future.result()
        finally:
            is_ending.set()
            pool.shutdown(cancel_futures=True)


def download(
    file: Download, algorithm: Callable[[], Any] = hashlib.sha256, advance: Callable[[int], None] = lambda _: None
) -> None:
    """Copy a file to its path, where it is complete or does not exist. No other process may do so.

    Continues the partial copy of an interrupted call. Copies again if the size or checksum is wrong. `advance` is
    called with the bytes that were copied, or found; negative if they are given up.

    Raises StorageError, which is a DamagedError for a wrong checksum or size, and OSError if the local disk fails.
    """
    url, path, size, checksum = file
    partial = path.with_name(f".{path.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.replace(partial)
    problem = ""
    for _ in range(_DOWNLOADS):
        copied, found = _copy_rest(url, partial, size, algorithm(), advance)
        if copied == size and checksum in (None, found):
            partial.replace(path)
            return
        problem = f"{copied:,} bytes, expected {size:,}" if copied != size else f"checksum {found}, expected {checksum}"
        log.warning("%s: found %s; copying it again", url, problem)
        partial.unlink()
        advance(-copied)
    raise DamagedError(f"{url} is damaged: found {problem}")


def _copy_rest(url: str, partial: Path, size: int, digest: Any, advance: Callable[[int], None]) -> tuple[int, str]:
    """Append the missing bytes. Returns the size and checksum of the result."""
    with partial.open("a+b") as file:
        file.seek(0)
        while block := file.read(_BUFFER):
            digest.update(block)
            advance(len(block))
        if file.tell() < size:
            with open_url(url, file.tell()) as source:
                while block := source.read(_BUFFER):
                    file.write(block)
                    digest.update(block)
                    advance(len(block))
        return file.tell(), digest.hexdigest()
