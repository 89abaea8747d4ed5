"""Split one file into documents: plain text, JSON lines, CSV, TSV or Parquet, possibly compressed.

A line ends at "\n" or "\r\n" only, not at Unicode line separators. Only the line end is removed. Bytes that are not
UTF-8 are rejected, naming the line.
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
from typing import IO, TYPE_CHECKING, NamedTuple, cast

import regex
import zstandard

from experiment.csv_and_jsonl import (
    CsvFormat,
    column_index,
    missing_column,
    raw_lines,
    read_csv,
    read_json_lines,
    text_lines,
    unexpected_cell,
)
from experiment.errors import UserError
from experiment.parquet import parquet_rows
from pretrain.corpus.options import TextOptions

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# .raw and .tokens are WikiText's names for plain text.
_SUFFIXES = {
    "text": "txt text raw tokens",
    "jsonl": "jsonl ndjson json",
    "csv": "csv",
    "tsv": "tsv",
    "parquet": "parquet",
}
_MAX_DOCUMENT = 1 << 30  # characters; a text without the expected blank lines may be larger than memory
_MATCH_SECONDS = 10.0  # for a line; a pattern that tries all ways to split a line may take years
_ZSTANDARD_BYTES = 1 << 13  # decompressed at once; they may become 10,000 times as many
_CONVERSIONS = {
    "convert it to text, for instance with pandoc": "docx epub htm html odt rtf xhtml",
    "convert it to text, for instance with pdftotext": "pdf",
    "convert it to text, for instance with LibreOffice": "doc ppt pptx",
    "convert it to .csv, for instance with LibreOffice": "ods xls xlsx",
    "decompress it": "7z br bz2 lz4 rar xz",
}
_CONVERSION_OF = {suffix: advice for advice, suffixes in _CONVERSIONS.items() for suffix in suffixes.split()}
_FORMAT_OF = {suffix: name for name, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}


class Document(NamedTuple):
    """A text and its place in the source."""

    text: str
    origin: str  # file, or archive::member
    line: int  # first line, or row in Parquet and hub data sets; counted from 1

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


def detect_format(name: str) -> tuple[str | None, str]:
    """Tell from a file name its format (text, jsonl, csv, tsv, parquet or None) and compression (gz, zst or "")."""
    suffix, compression = _suffixes(name)
    return _FORMAT_OF.get(suffix), compression


def _suffixes(name: str) -> tuple[str, str]:
    """The suffix that tells the format, and that of the compression; empty if there is none."""
    *suffixes, last = ["", *name.lower().split(".")[1:]]
    return (suffixes[-1], last) if suffixes and last in ("gz", "zst") else (last, "")


def check_is_read(name: str, origin: str) -> None:
    """Raise UserError for a format that is not read, such as .pdf."""
    suffix, _ = _suffixes(name)
    if suffix in _CONVERSION_OF:
        raise UserError(f"--source {origin}: .{suffix} files are not read; {_CONVERSION_OF[suffix]}")


def parse_documents(
    stream: IO[bytes], name: str, origin: str, options: TextOptions, stats: ReadStats
) -> Iterator[Document]:
    """Yield the documents of one file in order. If its name tells no format, it is plain text."""
    file_format, compression = detect_format(name)
    with explain_read_errors(origin):
        stream = decompress(stream, compression)
        if file_format == "parquet":
            # Parquet has its index at the end, and only plain files are seekable.
            seekable = not compression and origin == name
            yield from _parse_parquet(stream if seekable else _copy_to_disk(stream), origin, options.column)
        elif file_format == "jsonl":
            yield from _parse_json_lines(_text_lines(stream, origin), origin, options.column)
        elif file_format in ("csv", "tsv"):
            separator = options.sep or ("," if file_format == "csv" else "\t")
            csv_format = CsvFormat(separator, options.quoting, options.header != "none")
            yield from _parse_csv(_text_lines(stream, origin), origin, csv_format, options.column)
        else:
            yield from _parse_text(_text_lines(stream, origin), origin, options, stats)


def _text_lines(stream: IO[bytes], origin: str) -> Iterator[str]:
    return text_lines(raw_lines(stream, origin), origin)


def cell_document(value: object, origin: str, row: int, column: str) -> Document:
    """Make a document of a table cell; null gives an empty one. Raises UserError for anything else but text."""
    if value is not None and not isinstance(value, str):
        raise unexpected_cell(f"{origin}:{row}", column, value)
    return Document(value or "", origin, row)


def _parse_text(lines: Iterable[str], origin: str, options: TextOptions, stats: ReadStats) -> Iterator[Document]:
    pattern = None if options.document_start is None else regex.compile(options.document_start)
    numbered = enumerate(map(_strip_line_end, lines), 1)
    if options.document == "line" and pattern is None:
        for number, line in numbered:
            yield Document(line, origin, number)
        return
    first, length = 1, 0
    collected: list[str] = []
    for number, line in numbered:
        is_separator = options.document == "blank_line" and not line.strip()
        is_start = pattern is not None and _matches(pattern, line, f"{origin}:{number}")
        stats.start_matches += is_start
        if (is_separator or is_start) and collected:
            yield Document("\n".join(collected), origin, first)
            collected, length = [], 0
        if not is_separator:
            first = first if collected else number
            collected.append(line)
            length += len(line) + 1
        if length > _MAX_DOCUMENT:
            raise UserError(f"{origin}:{first}: the document has more than {_MAX_DOCUMENT:,} characters; split it")
    if collected:
        yield Document("\n".join(collected), origin, first)


def _matches(pattern: regex.Pattern[str], line: str, place: str) -> bool:
    try:
        return pattern.search(line, timeout=_MATCH_SECONDS) is not None
    except TimeoutError:
        raise UserError(
            f"{place}: --document_start '{pattern.pattern}' takes longer than {_MATCH_SECONDS:.0f} s on this line; "
            "write it without a repeated group that can match the same text in several ways, such as (a+)+"
        ) from None


def _strip_line_end(line: str) -> str:
    if line.endswith("\r\n"):
        return line[:-2]
    return line[:-1] if line.endswith("\n") else line


def _parse_json_lines(lines: Iterable[str], origin: str, column: str) -> Iterator[Document]:
    for number, row in read_json_lines(lines, origin):
        if column not in row:
            raise missing_column(f"{origin}:{number}", column, row, "--column")
        yield cell_document(row[column], origin, number, column)


def _parse_csv(lines: Iterable[str], origin: str, csv_format: CsvFormat, column: str) -> Iterator[Document]:
    names, rows = read_csv(lines, origin, csv_format)
    if names:
        index = column_index(names, column, origin, "--column", csv_format)
        for number, cells in rows:
            yield Document(cells[index], origin, number)


def _parse_parquet(stream: IO[bytes], origin: str, column: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(stream)
        column_index(file.schema_arrow.names, column, origin, "--column")  # rejects none and several
        for row, (value,) in enumerate(parquet_rows(file, [column]), 1):
            yield cell_document(value, origin, row, column)
    except pyarrow.ArrowException as error:
        raise UserError(f"{origin} is not a Parquet file, or damaged: {error}") from None


def _copy_to_disk(stream: IO[bytes]) -> IO[bytes]:
    copy = tempfile.TemporaryFile()  # noqa: SIM115  (deleted when it is closed)
    shutil.copyfileobj(stream, copy, 1 << 20)
    copy.seek(0)
    return copy


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
            chunk = self._input or self._compressed.read(_ZSTANDARD_BYTES)
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
