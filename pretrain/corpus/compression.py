"""Read .gz and .zst: all members of a file, one after another, or those that begin in a range of its bytes.

A .gz consists of members and a .zst of frames, here both called members. bgzip, pzstd and WARC writers make them
small, so a large file can be read in parallel, from the first member that begins in each range. gzip and zstd write a
single one.
"""

import io
import zlib
from typing import IO, TYPE_CHECKING, Any

import zstandard

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_MAGIC = {"gz": b"\x1f\x8b\x08", "zst": b"\x28\xb5\x2f\xfd"}
_INPUT_BYTES = 1 << 13  # decompressed at once; they may become 10,000 times as many
_BLOCK = 1 << 20  # searched at once for the start of a member
_CHECKED_BYTES = 1 << 16  # of a member; random bytes that look like a start do not decompress so far
_PROBED_BYTES = 1 << 20  # in which the first member ends if there are several small ones
_USUAL_RATIO = 4  # of text to its compressed size


def _decompressor(compression: str) -> Any:
    """Return an object with `decompress(data)`, `eof` and `unused_data`."""
    if compression == "gz":
        return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    # 2**31 is the largest window that `zstd --long` writes.
    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


def decompress(stream: IO[bytes], compression: str) -> IO[bytes]:
    """Open the content of a `gz` or `zst` stream. For any other `compression`, return the stream itself."""
    return io.BufferedReader(MemberReader(stream, compression), 1 << 20) if compression in _MAGIC else stream


class MemberReader(io.RawIOBase):
    """Reads members from the current position to the end. Raises EOFError if the last one is truncated.

    `end`: position in the decompressed content of the first member that begins at byte `stop` of the file or later;
    None until it is reached. There, this raises EOFError if `find_member` would not find this one.
    """

    def __init__(self, compressed: IO[bytes], compression: str, stop: int | None = None) -> None:
        self.end: int | None = None
        self._compressed, self._compression, self._stop = compressed, compression, stop
        self._member: Any = None  # that is being decompressed
        self._input, self._output = b"", memoryview(b"")
        self._written = 0  # bytes decompressed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        while not self._output:
            self._input = self._input or self._compressed.read(_INPUT_BYTES)
            if self._member is None and not self._begin_member():
                return 0
            if not self._input:
                raise EOFError("its last part has no end")
            self._output = memoryview(self._member.decompress(self._input))
            self._written += len(self._output)
            ended, self._input = self._member.eof, self._member.unused_data
            self._member = None if ended else self._member
        target = memoryview(buffer)
        size = min(len(target), len(self._output))
        target[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def _begin_member(self) -> bool:
        """Begin the next member. Returns False at the end of the file."""
        while self._compression == "gz" and self._input.startswith(b"\0"):  # .gz may be padded with zeros
            self._input = self._input.lstrip(b"\0") or self._compressed.read(_INPUT_BYTES)
        if not self._input:
            return False
        magic = _MAGIC[self._compression]
        if len(self._input) < len(magic):
            self._input += self._compressed.read(_INPUT_BYTES)
        # Zstandard has frames without content, with another magic number.
        if self._stop is not None and self.end is None and self._input.startswith(magic):
            self._check_boundary(self._compressed.tell() - len(self._input), self._stop)
        self._member = _decompressor(self._compression)
        return True

    def _check_boundary(self, start: int, stop: int) -> None:
        if start < stop:
            return
        position = self._compressed.tell()
        if find_member(self._compressed, self._compression, stop, start + 1) != start:
            raise EOFError(f"cannot tell where its parts begin, between bytes {stop:,} and {start:,}")
        self._compressed.seek(position)
        self.end = self._written


def find_member(file: IO[bytes], compression: str, start: int, stop: int) -> int | None:
    """Return where the first member begins in the bytes [start, stop) of a file, or None."""
    magic = _MAGIC[compression]
    while start < stop:
        file.seek(start)
        block = file.read(min(_BLOCK, stop - start) + len(magic) - 1)
        found = block.find(magic)
        if found < 0:
            start += _BLOCK
        elif _begins_member(file, compression, start + found):
            return start + found
        else:
            start += found + 1
    return None


def _begins_member(file: IO[bytes], compression: str, start: int) -> bool:
    file.seek(start)
    member, written = _decompressor(compression), 0
    try:
        while written < _CHECKED_BYTES and not member.eof and (data := file.read(_INPUT_BYTES)):
            written += len(member.decompress(data))
    except (zlib.error, zstandard.ZstdError):
        return False
    return True


def has_several_members(file: IO[bytes], compression: str) -> bool:
    """Return whether the first member is small and another one follows it. `file`: at its start."""
    member = _decompressor(compression)
    while not member.eof and file.tell() < _PROBED_BYTES and (data := file.read(_INPUT_BYTES)):
        member.decompress(data)
    start = file.tell() - len(member.unused_data)
    return member.eof and find_member(file, compression, start, start + 1) == start


def estimate_content_bytes(file: IO[bytes], compression: str, size: int) -> int:
    """Estimate the decompressed size of a file of one member from its header or its end.

    Equal files give equal estimates on every machine: text has no boundaries that depend on how far a library reads.
    """
    if compression == "gz":
        file.seek(size - 4)
        modulo = int.from_bytes(file.read(4), "little")  # of 2**32
        estimate = modulo + (max(0, _USUAL_RATIO * size - modulo) >> 32 << 32)
        return estimate if estimate >= size else _USUAL_RATIO * size  # else it is of padding, or of a last small member
    if compression == "zst":
        file.seek(0)
        content_size = zstandard.get_frame_parameters(file.read(18)).content_size
        if size <= content_size < 2**63:
            return int(content_size)
    return size if compression == "" else _USUAL_RATIO * size
