"""Files in object storage and on web servers, by URL, through fsspec: list, read from any position, copy, delete.

Only this module imports fsspec. Each protocol is configured as its library documents, by environment variables such as
AWS_PROFILE and AWS_ENDPOINT_URL and by fsspec's own configuration files.

All functions retry transient errors, such as a busy server, a cut connection or a timeout, with exponential backoff.
For other errors, and at the last attempt, they raise StorageError: one line that names the URL.
"""

import errno
import glob
import io
import os
import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from experiment.errors import UserError, first_line, warn_once
from experiment.files import atomic_write, remove_unfinished

T = TypeVar("T")

_EXTRAS = {"s3": "s3", "gs": "gcs", "http": "http", "https": "http"}
_PROTOCOLS = ("s3", "gs", "hf", "https", "http", "file")
# Four parts of an upload at once take 200 MB of memory.
_OPTIONS: dict[str, dict[str, Any]] = {"s3": {"max_concurrency": 4}}
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`",
    "hf": "set HF_TOKEN, or run `hf auth login`",
}
_WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds between attempts; the libraries make several requests in each
_BLOCK = 8 << 20  # bytes of a range read
_BUFFER = 1 << 20
# Names of error types, of botocore, aiohttp, httpx and http.client, which need not be installed.
_TRANSIENT = {
    *("ClientConnectionError", "ClientPayloadError", "ConnectionError", "HTTPClientError", "IncompleteRead"),
    *("ResponseParserError", "TimeoutError", "TransportError"),
}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ProfileNotFound"}
_EXPIRED = {"FileExpired"}  # of s3fs: another version is there
# The names that storages give to the checksum of a file, or to the time of its last change.
_VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "Content-MD5", "LastModified", "Last-Modified", "mtime")
_TRANSIENT_NUMBERS = {
    errno.EBUSY,  # also for the status 503 of S3
    errno.EREMOTEIO,  # 500
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ETIMEDOUT,
}


class StorageError(UserError):
    """A URL cannot be read or written."""


class MissingError(StorageError):
    """A file or folder does not exist, but its bucket does."""


class DeniedError(StorageError):
    """The server refuses a request. The file may not exist: web servers say so in several ways, and S3 denies access if
    the bucket may not be listed (https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetObject.html)."""


class DamagedError(StorageError):
    """A file does not have the expected content."""


class FileInfo(NamedTuple):
    """The size of a file in bytes, and a version that changes with its content; empty if the server gives none."""

    size: int
    version: str


def is_url(name: str) -> bool:
    return "://" in name


def without_secrets(url: str) -> str:
    """Return a URL without user, password and query, or the name of a file as it is."""
    if not is_url(url):
        return url
    protocol, _, rest = url.partition("?")[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{protocol}://{host.rpartition('@')[2]}{slash}{path}"


def join(url: str, *names: str) -> str:
    """Return the URL of a file below a folder."""
    return "/".join([url.rstrip("/"), *names])


def list_files(url: str) -> dict[str, FileInfo]:
    """Return the files that a URL names, sorted: itself, those below a folder, or those that match a pattern such as
    `s3://bucket/*.jsonl`. Raises StorageError if there are none."""

    def find(fs: Any, path: str) -> dict[str, Any]:
        if glob.has_magic(path):
            found: dict[str, Any] = fs.glob(path, detail=True)
            if not found:
                fs.info(re.split(r"[*?[]", path)[0].rpartition("/")[0])  # raises if there is no such folder
        else:
            info = fs.info(path)
            found = {info["name"]: info} if info["type"] == "file" else fs.find(path, detail=True)
        return {fs.unstrip_protocol(name): info for name, info in found.items() if _is_file(name, info)}

    if not (found := _call(url, find)):
        raise StorageError(f"{url}: there are no such files")
    return {name: _file_info(name, found[name]) for name in sorted(found)}


def _is_file(name: str, info: dict[str, Any]) -> bool:
    """Return whether this is a file: not a folder, nor the empty object with which some programs mark one."""
    return info["type"] == "file" and not (name.endswith("/") and info["size"] == 0)


def _file_info(name: str, info: dict[str, Any]) -> FileInfo:
    if info["size"] is None:
        raise StorageError(f"{name}: the server does not give the size of the file")
    return FileInfo(info["size"], next((str(info[key]) for key in _VERSIONS if info.get(key)), ""))


def _changed(url: str) -> StorageError:
    return StorageError(f"{url} changed while it was read; run the command again")


def list_folders(url: str) -> list[str]:
    """Return the names of the folders in a folder, sorted. Empty if it does not exist, as folders without files do
    not."""
    try:
        found = _call(url, lambda fs, path: fs.ls(path, detail=True))
    except MissingError:
        return []
    return sorted(info["name"].rstrip("/").rpartition("/")[2] for info in found if info["type"] == "directory")


def exists(url: str) -> bool:
    """Return whether there is a file or folder of this name."""
    try:
        _call(url, lambda fs, path: fs.info(path))
    except MissingError:
        return False
    return True


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
        return _file_info(name, _call(name, lambda fs, path: fs.info(path)))
    found = os.stat(name)  # noqa: PTH116  (a Path per file takes longer)
    return FileInfo(found.st_size, str(found.st_mtime_ns))


def read_bytes(url: str) -> bytes:
    """Read a file. Raises MissingError if it does not exist."""
    content: bytes = _call(url, lambda fs, path: fs.cat_file(path))
    return content


def write_bytes(url: str, content: bytes) -> None:
    """Create or replace a file. Nobody sees a part of it."""
    _write(url, lambda fs, path: fs.pipe_file(path, content))


def upload(path: Path, url: str) -> None:
    """Copy a file to a URL, where nobody sees a part of it. Raises OSError if it cannot be read."""
    try:
        _write(url, lambda fs, target: fs.put_file(str(path), target))
    except StorageError:
        path.open("rb").close()  # raises if the file is the cause: it may have been deleted
        raise


def _write(url: str, put: Callable[[Any, str], object]) -> None:
    """Create or replace a file with `put`, which gets the file system and a path in it: on a disk, where fsspec would
    overwrite the file in place, a temporary one."""

    def replace(fs: Any, path: str) -> None:
        if not url.startswith("file:"):
            put(fs, path)
            return
        file = Path(path)
        remove_unfinished(file.parent, file.name)  # of a process that was killed
        with atomic_write(file) as temporary:
            put(fs, str(temporary))

    _call(url, replace)


def delete(url: str) -> None:
    """Delete a file, or a folder with all in it, if it exists."""
    with suppress(MissingError):
        _call(url, lambda fs, path: fs.rm(path, recursive=True))


class _Reader(io.RawIOBase):
    """Reads a file from any position, and opens it again there after an error."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._file: Any = None
        self._position = 0
        self._info: FileInfo | None = None
        self._size: int = _retry(url, lambda: self._open().size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._size:
            return 0
        block = _retry(self._url, lambda: self._read(len(buffer)))
        buffer[: len(block)] = block
        self._position += len(block)
        return len(block)

    def _read(self, count: int) -> bytes:
        try:
            file = self._open()
            file.seek(self._position)
            block: bytes = file.read(count)
            if not block:
                raise ConnectionError(f"the file ended at byte {self._position:,} of {self._size:,}")
        except BaseException:
            self._close_file()
            raise
        return block

    def _open(self) -> Any:
        if self._file is None:
            fs, path = _open_filesystem(self._url)
            self._file = fs.open(path, "rb", block_size=_BLOCK, cache_type="readahead")
            details = getattr(self._file, "details", {"size": self._file.size})  # of file://, that is all
            info = _file_info(self._url, details)
            if self._info not in (None, info):
                raise _changed(self._url)
            self._info = info
        return self._file

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def close(self) -> None:
        self._close_file()
        super().close()


def _open_filesystem(url: str) -> tuple[Any, str]:
    """Return the file system of fsspec, one per thread and process, and the path in it."""
    import fsspec  # takes 0.1 s, and the libraries of the protocols a second

    if (protocol := url.partition("://")[0]) not in _PROTOCOLS:
        known = ", ".join(f"{name}://" for name in _PROTOCOLS)
        raise StorageError(f"{without_secrets(url)}: unknown protocol '{protocol}'; expected one of {known}")
    if protocol.startswith("http") and "@" in url.split("/")[2]:  # the URL is written to manifests and reports
        raise StorageError(
            f"{without_secrets(url)}: a URL with a user and password is not read; set the header Authorization in the "
            f"client_kwargs of '{protocol}' in fsspec's configuration instead"
        )
    if "::" in url:  # fsspec would take it for a chain of URLs
        raise StorageError(f"{without_secrets(url)}: a name with '::' cannot be read; rename the file")
    try:
        fs, path = fsspec.core.url_to_fs(url, **_OPTIONS.get(protocol, {}))
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        advice = f"install the extra: pip install 'deepcloze[{extra}]'" if extra else str(error)
        raise StorageError(f"{url}: {protocol}:// needs a library that is missing; {advice}") from None
    return fs, path


def _call(url: str, function: Callable[[Any, str], T]) -> T:
    """Call `function(file system, path)`, which finds no listing of an earlier call. Raises StorageError."""

    def call() -> T:
        fs, path = _open_filesystem(url)
        fs.invalidate_cache()
        return function(fs, path)

    return _retry(url, call)


def _retry(url: str, function: Callable[[], T]) -> T:
    """Like `retry`. After an error, the next call reads credentials and other settings again: a file system keeps those
    that it began with."""
    import fsspec

    try:
        return retry(url, function)
    except MissingError:  # expected
        raise
    except StorageError:
        if (file_system := fsspec.registry.get(url.partition("://")[0])) is not None:
            file_system.clear_instance_cache()
        raise


def retry(name: str, function: Callable[[], T], explain: Callable[[str, Exception], UserError] | None = None) -> T:
    """Call `function`, again after transient errors.

    `name`: of its target, for messages. `explain`: makes the UserError to raise for other errors; default: makes
    a StorageError.
    """
    waits = list(_WAITS)
    while True:
        try:
            return function()
        except UserError:
            raise
        except Exception as raised:
            if not _is_transient(error := _error_of_server(raised)):
                raise (explain or _storage_error)(name, error) from error
            if not waits:
                attempts = len(_WAITS) + 1
                raise StorageError(f"{name}: no success in {attempts} attempts: {first_line(error)}") from error
            warn_once(f"{name}: {first_line(error)}; trying again")
            time.sleep(waits.pop(0) * random.uniform(0.75, 1.25))  # hosts that failed together try again one by one


def _error_of_server(error: Exception) -> Exception:
    """Return the cause: fsspec raises FileNotFoundError for any error of a web server."""
    cause = error.__cause__
    is_of_http = type(cause).__module__.startswith("aiohttp.")
    return cause if isinstance(cause, Exception) and is_of_http else error


def _is_transient(error: BaseException) -> bool:
    names = {base.__name__ for base in type(error).__mro__}
    if names & (_NO_CREDENTIALS | _EXPIRED) or isinstance(error, FileNotFoundError | PermissionError):
        return False
    if (status := _http_status(error)) is not None:
        return status in (408, 429) or status >= 500
    return bool(names & _TRANSIENT) or getattr(error, "errno", None) in _TRANSIENT_NUMBERS


def _http_status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    status = getattr(error, "status", None) or getattr(response, "status_code", None) or getattr(error, "code", None)
    return status if isinstance(status, int) else None


def _storage_error(url: str, error: BaseException) -> StorageError:
    """Describe the error and, if credentials are wrong, where they come from."""
    names = {base.__name__ for base in type(error).__mro__}
    advice = _CREDENTIALS.get(url.partition("://")[0], "the server requires credentials")
    cause = first_line(error)
    if names & _NO_CREDENTIALS:
        return StorageError(f"{url}: no credentials: {advice}")
    if names & _EXPIRED:
        return _changed(url)
    if isinstance(error, PermissionError):
        return DeniedError(f"{url}: access denied ({cause}): check the credentials, which may have expired; {advice}")
    if isinstance(error, FileNotFoundError):
        if "bucket does not exist" in str(error):
            return StorageError(f"{url}: there is no bucket '{url.split('/')[2]}'")
        return MissingError(f"{url} does not exist")
    kind = StorageError if _http_status(error) is None else DeniedError
    return kind(f"{url}: {cause}")
