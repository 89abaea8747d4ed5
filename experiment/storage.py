"""Files in object storage and on web servers, by URL, through fsspec: list, read from any position, copy, delete.

Only this module imports fsspec. Each protocol is configured as its library documents, by environment variables such as
AWS_PROFILE and AWS_ENDPOINT_URL and by fsspec's own configuration files.

Every function tries again, with exponential backoff, after errors that may pass: a busy server, a cut connection, a
timeout. All of them raise StorageError for the others: one line that names the URL.
"""

import errno
import hashlib
import io
import logging
import os
import random
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, TypeVar

from filelock import FileLock

from experiment.errors import UserError, first_line
from experiment.files import cache_folder, json_digest

log = logging.getLogger(__name__)

T = TypeVar("T")

_EXTRAS = {"s3": "s3", "gs": "gcs", "http": "http", "https": "http"}
_PROTOCOLS = ("s3", "gs", "hf", "https", "http", "file")
# Four parts of an upload at once take 200 MB of memory.
_OPTIONS: dict[str, dict[str, Any]] = {"s3": {"max_concurrency": 4}, "file": {"auto_mkdir": True}}
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`",
    "hf": "set HF_TOKEN, or run `hf auth login`",
}
_WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds between attempts; the libraries make several requests in each
_BLOCK = 8 << 20  # bytes of a range read
_BUFFER = 1 << 20
_DOWNLOADS = 3  # of a file with a wrong checksum
# Names of error types, of botocore, aiohttp, httpx and http.client, which need not be installed.
_PASSING = {
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionError",
    "HTTPClientError",
    "IncompleteRead",
    "ResponseParserError",
    "TimeoutError",
    "TransportError",
}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ProfileNotFound"}
# The names that storages give to the checksum of a file, or to the time of its last change.
_VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "Content-MD5", "LastModified", "mtime")
_PASSING_NUMBERS = {
    errno.EBUSY,  # also for the status 503 of S3
    errno.EREMOTEIO,  # 500
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ETIMEDOUT,
}


class Digest(Protocol):
    """A checksum of hashlib or xxhash."""

    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


class StorageError(UserError):
    """What a URL names cannot be read or written."""


class DamagedError(StorageError):
    """A file whose content is not the expected one."""


class UnreachableError(StorageError):
    """A server that still did not answer at the last attempt, or was still busy."""


class FileInfo(NamedTuple):
    """The size of a file in bytes, and a version that changes with its content; empty if the server gives none."""

    size: int
    version: str


def is_url(name: str) -> bool:
    return "://" in name


def join(url: str, *names: str) -> str:
    """The URL of a file below a folder."""
    return "/".join([url.rstrip("/"), *names])


def list_files(url: str) -> dict[str, FileInfo]:
    """The files that a URL names, sorted: itself, those below a folder, or those that match a pattern such as
    `s3://bucket/*.jsonl`. Raises StorageError if there are none."""

    def find() -> dict[str, Any]:
        fs, path = _open_filesystem(url)
        fs.invalidate_cache()
        if any(letter in path for letter in "*["):
            found: dict[str, Any] = fs.glob(path, detail=True)
            if not found:
                fs.info(path.split("*")[0].split("[")[0].rpartition("/")[0])  # raises if there is no such folder
        else:
            info = fs.info(path)
            found = {info["name"]: info} if info["type"] == "file" else fs.find(path, detail=True)
        return {fs.unstrip_protocol(name): info for name, info in found.items() if _is_file(name, info)}

    found = _retrying(url, find)
    if not found:
        raise StorageError(f"{url}: there are no such files")
    return {name: _file_info(name, found[name]) for name in sorted(found)}


def _is_file(name: str, info: dict[str, Any]) -> bool:
    """False for a folder, also for the empty object with which some programs mark one."""
    return info["type"] == "file" and not (name.endswith("/") and info["size"] == 0)


def _file_info(name: str, info: dict[str, Any]) -> FileInfo:
    if info["size"] is None:
        raise _without_size(name)
    return FileInfo(info["size"], next((str(info[key]) for key in _VERSIONS if info.get(key)), ""))


def _without_size(url: str) -> StorageError:
    return StorageError(f"{url}: the server does not give the size of the file")


def list_folders(url: str) -> list[str]:
    """The names of the folders in a folder, sorted. Empty if it does not exist, as folders without files do not."""

    def find() -> list[str]:
        fs, path = _open_filesystem(url)
        fs.invalidate_cache()
        try:
            return sorted(info["name"].rstrip("/") for info in fs.ls(path, detail=True) if info["type"] == "directory")
        except FileNotFoundError as error:
            if _is_bucket_missing(error):
                raise
            return []

    return [name.rpartition("/")[2] for name in _retrying(url, find)]


def exists(url: str) -> bool:
    def find() -> bool:
        fs, path = _open_filesystem(url)
        fs.invalidate_cache()
        try:
            fs.info(path)
        except FileNotFoundError as error:
            if _is_bucket_missing(error):
                raise
            return False
        return True

    return _retrying(url, find)


def open_url(url: str, start: int = 0) -> IO[bytes]:
    """Open a file for reading from this position. It can seek, and reads ranges of the file."""
    reader = _Reader(url)
    reader.seek(start)
    return io.BufferedReader(reader, _BUFFER)


def open_file(name: str) -> IO[bytes]:
    """Open a path or URL for reading. It can seek. Raises OSError for a path, StorageError for a URL."""
    return open_url(name) if is_url(name) else Path(name).open("rb", buffering=_BUFFER)


def stat_file(name: str) -> FileInfo:
    """Describe a file, given as a path or URL. Raises OSError for a path, StorageError for a URL."""
    if is_url(name):
        return _retrying(name, partial(_stat_url, name))
    found = os.stat(name)  # noqa: PTH116  (a Path per file takes longer)
    return FileInfo(found.st_size, str(found.st_mtime_ns))


def _stat_url(url: str) -> FileInfo:
    fs, path = _open_filesystem(url)
    fs.invalidate_cache()
    return _file_info(url, fs.info(path))


def read_bytes(url: str) -> bytes:
    def read() -> bytes:
        fs, path = _open_filesystem(url)
        content: bytes = fs.cat_file(path)
        return content

    return _retrying(url, read)


def write_bytes(url: str, content: bytes) -> None:
    """Create or replace a file. Nobody sees a part of it."""

    def write() -> None:
        fs, path = _open_filesystem(url)
        fs.pipe_file(path, content)

    _retrying(url, write)


def upload(path: Path, url: str) -> None:
    """Copy a file to a URL. Raises OSError if it cannot be read."""
    path.open("rb").close()

    def put() -> None:
        fs, target = _open_filesystem(url)
        fs.put_file(str(path), target)

    try:
        _retrying(url, put)
    except StorageError:
        path.stat()  # raises if the file was deleted meanwhile
        raise


def delete(url: str) -> None:
    """Delete a file, or a folder with all in it, if it exists."""

    def remove() -> None:
        fs, path = _open_filesystem(url)
        fs.invalidate_cache()
        if fs.exists(path):
            fs.rm(path, recursive=True)

    _retrying(url, remove)


def local_folder(url: str, left_out: Collection[str] = ()) -> Path:
    """A copy of a folder in the user's cache folder, which is made unless there is one of the same files.

    `left_out`: suffixes of files that are not copied. Raises StorageError.
    """
    files = {name: info for name, info in list_files(url).items() if not name.endswith(tuple(left_out))}
    folder = cache_folder() / "folders" / json_digest([url, *files.items()])[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        for name, info in files.items():
            path = folder / "files" / name.removeprefix(url.rstrip("/")).lstrip("/")
            if not path.exists():
                download(name, path, info.size)
    return folder / "files"


def download(
    url: str,
    path: Path,
    size: int,
    checksum: str | None = None,
    algorithm: Callable[[], Digest] = hashlib.sha256,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Copy a file to a local path, which is complete or does not exist. No other process may do so.

    What an interrupted call has copied, beside it, is continued. A copy with a wrong size or checksum is made again.

    Args:
        size: bytes that are expected.
        checksum: that is expected, in hexadecimal.
        algorithm: of the checksum.
        advance: called with the bytes that were copied, or found; negative if they are given up.

    Raises StorageError, which is a DamagedError for a wrong checksum or size, and OSError if the local disk fails.
    """
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


def _copy_rest(url: str, partial: Path, size: int, digest: Digest, advance: Callable[[int], None]) -> tuple[int, str]:
    """Append what is missing. Returns the size and checksum of the result."""
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


class _Reader(io.RawIOBase):
    """Reads a file from any position, and opens it again there after an error."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._file: Any = None
        self._position = 0
        self._size: int = _retrying(url, lambda: self._open().size)
        if self._size is None:
            raise _without_size(url)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._size:
            return 0
        block = _retrying(self._url, lambda: self._read(len(buffer)))
        buffer[: len(block)] = block
        self._position += len(block)
        return len(block)

    def _read(self, count: int) -> bytes:
        try:
            file = self._open()
            if file.tell() != self._position:
                file.seek(self._position)
            block: bytes = file.read(count)
        except BaseException:
            self._close_file()
            raise
        if not block:
            self._close_file()
            raise ConnectionError(f"the file ended at byte {self._position:,} of {self._size:,}")
        return block

    def _open(self) -> Any:
        if self._file is None:
            fs, path = _open_filesystem(self._url)
            self._file = fs.open(path, "rb", block_size=_BLOCK, cache_type="readahead")
        return self._file

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def close(self) -> None:
        self._close_file()
        super().close()


def _open_filesystem(url: str) -> tuple[Any, str]:
    """The file system of fsspec, and the path in it. In a forked process, another one."""
    import fsspec  # takes 0.1 s, and the libraries of the protocols a second

    protocol = _protocol(url)
    if protocol not in _PROTOCOLS:
        known = ", ".join(f"{name}://" for name in _PROTOCOLS)
        raise StorageError(f"{url}: unknown protocol '{protocol}'; expected one of {known}")
    if "::" in url:  # fsspec would take it for a chain of URLs
        raise StorageError(f"{url}: a name with '::' cannot be read; rename the file")
    try:
        fs, path = fsspec.core.url_to_fs(url, **_OPTIONS.get(protocol, {}))
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        advice = f"install the extra: pip install 'deepcloze[{extra}]'" if extra else str(error)
        raise StorageError(f"{url}: {protocol}:// needs a library that is missing; {advice}") from None
    return fs, path


def _protocol(url: str) -> str:
    return url.partition("://")[0]


def _retrying(url: str, function: Callable[[], T]) -> T:
    """Call `function`, again if it fails for a reason that may pass. Raises StorageError."""
    waits = list(_WAITS)
    while True:
        try:
            return function()
        except StorageError:
            raise
        except Exception as raised:
            error = _error_of_server(raised)
            if not _may_pass(error):
                raise StorageError(_describe(url, error)) from error
            if not waits:
                attempts = len(_WAITS) + 1
                raise UnreachableError(f"{url}: no success in {attempts} attempts: {first_line(error)}") from error
            wait = waits.pop(0) * random.uniform(0.75, 1.25)  # hosts that failed together try again one by one
            log.warning("%s: %s; trying again in %.0f s", url, first_line(error), wait)
            time.sleep(wait)


def _error_of_server(error: Exception) -> Exception:
    """fsspec raises FileNotFoundError for any error of a web server."""
    cause = error.__cause__
    is_of_http = type(cause).__module__.startswith("aiohttp.")
    return cause if isinstance(cause, Exception) and is_of_http else error


def _may_pass(error: BaseException) -> bool:
    names = {base.__name__ for base in type(error).__mro__}
    if names & _NO_CREDENTIALS or isinstance(error, FileNotFoundError | PermissionError):
        return False
    response = getattr(error, "response", None)
    status = getattr(error, "status", None) or getattr(response, "status_code", None) or getattr(error, "code", None)
    if isinstance(status, int):  # of HTTP
        return status == 429 or status >= 500
    return bool(names & _PASSING) or getattr(error, "errno", None) in _PASSING_NUMBERS


def _is_bucket_missing(error: BaseException) -> bool:
    return "bucket does not exist" in str(error)


def _describe(url: str, error: BaseException) -> str:
    names = {base.__name__ for base in type(error).__mro__}
    protocol = _protocol(url)
    advice = _CREDENTIALS.get(protocol, "the server wants some")
    if names & _NO_CREDENTIALS:
        return f"{url}: no credentials: {advice}"
    if isinstance(error, PermissionError):
        return f"{url}: access denied ({first_line(error)}): check the credentials, which may have expired; {advice}"
    if isinstance(error, FileNotFoundError):
        bucket = url.split("/")[2]
        return f"{url}: there is no bucket '{bucket}'" if _is_bucket_missing(error) else f"{url} does not exist"
    return f"{url}: {first_line(error)}"
