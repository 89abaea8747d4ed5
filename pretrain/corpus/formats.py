"""The bytes of one file -> its documents: plain text, JSON lines, CSV and Parquet, each perhaps compressed.

A document is a string that keeps the place it came from. Lines end at "\\n" or "\\r\\n" alone (no Unicode line
separators), only the line end is removed, and bytes that are no UTF-8 are refused with their line.
"""

import csv
import gzip
import io
import json
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
from pretrain.corpus.options import TextOptions

# A quote that is never closed swallows the rows after it. No honest field is longer than this many characters.
_LONGEST_FIELD = 1 << 27

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
            yield from _json_lines(_lines(stream, origin), origin, text_format)
        elif kind in ("csv", "tsv"):
            yield from _separated(_lines(stream, origin), origin, text_format, "," if kind == "csv" else "\t")
        else:
            yield from _plain(_lines(stream, origin), origin, text_format, stats)


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


def _lines(stream: IO[bytes], origin: str) -> Iterator[str]:
    """Lines as text, line ends included; a byte order mark is not text."""
    for number, raw in enumerate(stream, 1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{origin}:{number}: not UTF-8 text (byte 0x{raw[error.start]:02x} at column {error.start + 1}); "
                "convert the file first, for instance with iconv"
            ) from None
        yield line.removeprefix("\ufeff") if number == 1 else line


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


def _json_lines(lines: Iterable[str], origin: str, text_format: TextOptions) -> Iterator[Document]:
    column = text_format.column
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{origin}:{number}: expected one JSON object a line: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{origin}:{number}: expected one JSON object a line, found {line.strip()[:60]}")
        if column not in row:
            raise no_column(f"{origin}:{number}", column, list(row))
        yield Document(text_of(row[column], f"{origin}:{number}", column), origin, number)


def _separated(lines: Iterable[str], origin: str, text_format: TextOptions, separator: str) -> Iterator[Document]:
    csv.field_size_limit(_LONGEST_FIELD)
    rows = csv.reader(
        lines,
        delimiter=text_format.sep or separator,
        quoting=csv.QUOTE_NONE if text_format.quoting == csv.QUOTE_NONE else csv.QUOTE_MINIMAL,
        strict=True,
    )
    has_header = text_format.header != "none"
    names: list[str] | None = None
    place, before = 0, 0
    while True:
        before = rows.line_num
        try:
            row = next(rows, None)
        except csv.Error as error:
            hint = (
                ""
                if text_format.quoting == csv.QUOTE_NONE
                else "; if quotes are ordinary characters there, give --quoting 3"
            )
            raise UserError(f"{origin}:{before + 1}: bad row: {error}{hint}") from None
        if row is None:
            return
        if not row:  # an empty line
            continue
        if names is None:
            names = [str(cell) for cell in row] if has_header else [str(index) for index in range(len(row))]
            place = _column_place(origin, names, text_format)
            if has_header:
                continue
        if len(row) != len(names):
            hint = (
                ""
                if text_format.quoting == csv.QUOTE_NONE
                else "; if quotes are ordinary characters there, give --quoting 3"
            )
            raise UserError(f"{origin}:{before + 1}: expected {len(names)} fields, found {len(row)}{hint}")
        yield Document(str(row[place]), origin, before + 1)


def _column_place(origin: str, names: list[str], text_format: TextOptions) -> int:
    if text_format.column not in names:
        raise no_column(origin, text_format.column, names)
    if names.count(text_format.column) > 1:
        raise UserError(f"{origin}: two columns are called '{text_format.column}'")
    return names.index(text_format.column)


def _parquet(stream: IO[bytes], origin: str, text_format: TextOptions) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    column = text_format.column
    try:
        file = pyarrow.parquet.ParquetFile(stream)
        if column not in file.schema_arrow.names:
            raise no_column(origin, column, file.schema_arrow.names)
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
        raise UserError(f"{place}: expected text in '{column}', found {json.dumps(value, default=str)[:60]}")
    return value


def no_column(place: str, column: str, found: list[str]) -> UserError:
    return UserError(
        f"{place}: no column '{column}'; found: {', '.join(map(str, found))} (--column names the one with the text)"
    )
