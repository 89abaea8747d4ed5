"""Read .gz and .zst streams."""

import gzip
import io
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, cast

import zstandard

from experiment.errors import UserError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


def decompress(stream: IO[bytes], compression: str) -> IO[bytes]:
    """Open the content of a `gz` or `zst` stream. For any other `compression`, return the stream itself."""
    if compression == "gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=stream))
    if compression == "zst":
        return io.BufferedReader(_ZstandardReader(stream), 1 << 20)
    return stream


@contextmanager
def explain_read_errors(origin: str) -> Iterator[None]:
    """Turn read, decompression and archive errors into a UserError that names the file."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise UserError(f"{origin} is damaged or truncated: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {origin}: {error.strerror or error}") from None


class _ZstandardReader(io.RawIOBase):
    """Reads all frames of a .zst. Raises EOFError if the last one is truncated."""

    def __init__(self, compressed: IO[bytes]) -> None:
        self._compressed = compressed
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._input, self._output = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        while not self._output:
            chunk = self._input or self._compressed.read(1 << 17)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the last Zstandard frame has no end")
                return 0
            # 2**31 is the largest window that `zstd --long` writes.
            self._frame = self._frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            self._output = memoryview(self._frame.decompress(chunk))
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        target = memoryview(buffer)
        size = min(len(target), len(self._output))
        target[:size] = self._output[:size]
        self._output = self._output[size:]
        return size
