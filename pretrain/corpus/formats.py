"""The bytes of one file -> its documents: plain text, JSON lines, CSV and Parquet, each perhaps compressed.

A document is a string that keeps the place it came from. Lines end at "\\n" or "\\r\\n" alone (no Unicode line
separators), only the line end is removed, and bytes that are no UTF-8 are refused with their line.
"""

import gzip
import io
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, NamedTuple, cast

import zstandard

from experiment.errors import UserError
from experiment.tables import (
    CsvFormat,
    column_index,
    missing_column,
    not_text,
    read_csv,
    read_json_lines,
    text_lines,
)
from pretrain.corpus.options import TextOptions

# .raw and .tokens are WikiText's names for plain text.
_SUFFIXES = {
    "text": "txt text raw tokens",
    "jsonl": "jsonl ndjson json",
    "csv": "csv",
    "tsv": "tsv",
    "parquet": "parquet",
}
_KINDS = {suffix: kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}


class Document(NamedTuple):
    """One text and where it was found."""

    text: str
    origin: str  # the file, or archive::member
    line: int  # the line (in Parquet and hub data sets: the row) it begins at, from 1

    @property
    def place(self) -> str:
        return f"{self.origin}:{self.line}"


@dataclass
class ReadStats:
    """Counters that the readers update while documents are drawn from them."""

    empty_documents: int = 0  # dropped because they have no text
    finished_bytes: int = 0  # sizes on disk of the files read so far
    start_matches: int = 0  # lines that matched --document_start
    file_position: Callable[[], int] = lambda: 0  # bytes read of the current file

    @property
    def bytes_read(self) -> int:
        return self.finished_bytes + self.file_position()


def format_of(name: str) -> tuple[str | None, str]:
    """(text | jsonl | csv | tsv | parquet, or None for a name that says nothing; compression: gz | zst | '')."""
    lower = name.lower()
    compression = next((suffix for suffix in ("gz", "zst") if lower.endswith(f".{suffix}")), "")
    stem = lower.removesuffix(f".{compression}") if compression else lower
    return (_KINDS.get(stem.rsplit(".", 1)[-1]) if "." in stem else None), compression


def documents_of(
    stream: IO[bytes], name: str, origin: str, text_format: TextOptions, stats: ReadStats
) -> Iterator[Document]:
    """The documents of one file's bytes, in order. Its name says what they are; plain text where it says nothing."""
    kind, compression = format_of(name)
    with refusing_damage(origin):
        stream = decompressed(stream, compression)
        if kind == "parquet":
            # Only a plain file can be sought in; the index of a Parquet file stands at its end.
            direct = not compression and origin == name
            yield from _parquet(stream if direct else _spooled(stream), origin, text_format)
        elif kind == "jsonl":
            yield from _json_lines(text_lines(stream, origin), origin, text_format.column)
        elif kind in ("csv", "tsv"):
            separator = text_format.sep or ("," if kind == "csv" else "\t")
            csv_format = CsvFormat(separator, text_format.quoting, text_format.header != "none", "--quoting")
            yield from _csv(text_lines(stream, origin), origin, csv_format, text_format.column)
        else:
            yield from _plain(text_lines(stream, origin), origin, text_format, stats)


def decompressed(stream: IO[bytes], compression: str) -> IO[bytes]:
    """The bytes inside a .gz or .zst; other streams pass through."""
    if compression == "gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=stream))
    if compression == "zst":
        return io.BufferedReader(_Zstandard(stream), 1 << 20)
    return stream


class _Zstandard(io.RawIOBase):
    """The frames of a .zst, one after the other; EOFError where the last one is cut short."""

    def __init__(self, compressed: IO[bytes]) -> None:
        self._compressed = compressed
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._input, self._output = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            chunk = self._input or self._compressed.read(1 << 17)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("its last Zstandard frame has no end")
                return 0
            # 2**31 is the largest window that `zstd --long` writes.
            self._frame = self._frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            self._output = memoryview(self._frame.decompress(chunk))
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size


@contextmanager
def refusing_damage(origin: str) -> Iterator[None]:
    """Turns what the readers of compressed files and archives raise into one message that names the file."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise UserError(f"{origin} is damaged or cut short: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {origin}: {error.strerror or error}") from None


def _without_end(line: str) -> str:
    if line.endswith("\r\n"):
        return line[:-2]
    return line[:-1] if line.endswith("\n") else line


def _plain(lines: Iterable[str], origin: str, text_format: TextOptions, stats: ReadStats) -> Iterator[Document]:
    pattern = text_format.document_start
    numbered = enumerate(map(_without_end, lines), 1)
    if text_format.document == "line" and pattern is None:
        for number, line in numbered:
            yield Document(line, origin, number)
        return
    begun = 1
    held: list[str] = []
    for number, line in numbered:
        blank = text_format.document == "blank_line" and not line.strip()
        starts = pattern is not None and pattern.search(line) is not None
        stats.start_matches += starts
        if (blank or starts) and held:
            yield Document("\n".join(held), origin, begun)
            held = []
        if not blank:
            begun = begun if held else number
            held.append(line)
    if held:
        yield Document("\n".join(held), origin, begun)


def _json_lines(lines: Iterable[str], origin: str, column: str) -> Iterator[Document]:
    for number, row in read_json_lines(lines, origin):
        if column not in row:
            raise missing_column(f"{origin}:{number}", column, row, "--column")
        yield Document(text_of(row[column], f"{origin}:{number}", column), origin, number)


def _csv(lines: Iterable[str], origin: str, csv_format: CsvFormat, column: str) -> Iterator[Document]:
    names, rows = read_csv(lines, origin, csv_format)
    if names:
        index = column_index(names, column, origin, "--column")
        for number, cells in rows:
            yield Document(cells[index], origin, number)


def _parquet(stream: IO[bytes], origin: str, text_format: TextOptions) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    column = text_format.column
    try:
        file = pyarrow.parquet.ParquetFile(stream)
        if column not in file.schema_arrow.names:
            raise missing_column(origin, column, file.schema_arrow.names, "--column")
        row = 0
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield Document(text_of(value, f"{origin}:{row}", column), origin, row)
    except pyarrow.ArrowException as error:
        raise UserError(f"{origin} is no whole Parquet file: {error}") from None


def _spooled(stream: IO[bytes]) -> IO[bytes]:
    spool = tempfile.TemporaryFile()  # noqa: SIM115  (gone with its last reference)
    shutil.copyfileobj(stream, spool, 1 << 20)
    spool.seek(0)
    return spool


def text_of(value: Any, place: str, column: str) -> str:
    """The text of a cell; nothing at all counts as an empty document."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise not_text(place, column, value)
    return value
