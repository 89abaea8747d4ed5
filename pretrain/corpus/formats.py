"""The bytes of one file -> its documents: plain text, JSON lines, CSV and Parquet, each perhaps compressed.

A document is a string that keeps the place it came from. Lines end at "\\n" or "\\r\\n" alone (no Unicode line
separators), only the line end is removed, and bytes that are no UTF-8 are refused with their line.
"""

import csv
import gzip
import io
import json
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Literal, NamedTuple, cast

import zstandard

from experiment.errors import UserError
from pretrain.corpus.flags import choice

# A quote that is never closed swallows the rows after it. No honest field is longer than this many characters.
_LONGEST_FIELD = 1 << 27
Quoting = Literal[0, 1, 2, 3]  # the csv module's constants
# As in pandas, 0 to 2 differ in writing only.
_QUOTING: dict[str, Quoting] = {"0": 0, "1": 0, "2": 0, "3": 3}


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
class Reading:
    """How far the reading has come. Counted while documents are drawn from it."""

    empty: int = 0  # documents without text, dropped
    finished_bytes: int = 0  # of the files read so far, as they are on disk
    started: int = 0  # lines that matched --document_start
    position: Callable[[], int] = lambda: 0  # in the current file

    @property
    def bytes(self) -> int:
        return self.finished_bytes + self.position()


@dataclass(frozen=True)
class TextFormat:
    """How documents lie in the files."""

    document: str = "line"  # what a document is in plain text: line | blank_line | file
    document_start: re.Pattern[str] | None = None  # or: begun by each line in which this is found
    column: str = "text"
    separator: str | None = None  # None: as the file's name says
    quoting: Quoting = csv.QUOTE_MINIMAL
    header: bool = True


def parse_format(document: Any, document_start: Any, column: Any, sep: Any, quoting: Any, header: Any) -> TextFormat:
    """The flags of `deepcloze corpus` that say how to read text. Raises UserError for a value that makes no sense."""
    document = choice("document", document, ("line", "blank_line", "file"))
    pattern = None
    if document_start is not None:
        if document != "line":
            raise UserError(
                f"--document_start says what a document is in plain text, and so does --document {document}"
            )
        try:
            pattern = re.compile(str(document_start))
        except re.error as error:
            raise UserError(f"--document_start: '{document_start}' is no regular expression: {error}") from None
    separator = None if sep is None else {"\\t": "\t", "tab": "\t"}.get(str(sep), str(sep))
    if separator is not None and (len(separator) != 1 or separator in '\r\n"'):
        raise UserError(f"--sep: expected one character (\\t is a tab), found {sep!r}")
    if quoting is not None and str(quoting) not in _QUOTING:
        raise UserError(f"--quoting: expected 0, 1, 2 or 3 (3: quotes are ordinary characters), found {quoting}")
    if header is not None and str(header).lower() not in ("infer", "0", "none"):
        raise UserError(
            f"--header: expected infer (the first row names the columns) or none (there is no header), found {header}"
        )
    return TextFormat(
        document=document,
        document_start=pattern,
        column=str(column),
        separator=separator,
        quoting=csv.QUOTE_MINIMAL if quoting is None else _QUOTING[str(quoting)],
        header=str(header).lower() != "none" or header is None,
    )


def format_of(name: str) -> tuple[str | None, str]:
    """(text | jsonl | csv | tsv | parquet, or None for a name that says nothing; compression: gz | zst | '')."""
    lower = name.lower()
    compression = next((suffix for suffix in ("gz", "zst") if lower.endswith(f".{suffix}")), "")
    stem = lower.removesuffix(f".{compression}") if compression else lower
    return (_KINDS.get(stem.rsplit(".", 1)[-1]) if "." in stem else None), compression


def documents_of(
    stream: IO[bytes], name: str, origin: str, text_format: TextFormat, reading: Reading
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
            yield from _plain(_lines(stream, origin), origin, text_format, reading)


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


def _plain(lines: Iterable[str], origin: str, text_format: TextFormat, reading: Reading) -> Iterator[Document]:
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
        reading.started += starts
        if (blank or starts) and held:
            yield Document("\n".join(held), origin, begun)
            held = []
        if not blank:
            begun = begun if held else number
            held.append(line)
    if held:
        yield Document("\n".join(held), origin, begun)


def _json_lines(lines: Iterable[str], origin: str, text_format: TextFormat) -> Iterator[Document]:
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


def _separated(lines: Iterable[str], origin: str, text_format: TextFormat, separator: str) -> Iterator[Document]:
    csv.field_size_limit(_LONGEST_FIELD)
    rows = csv.reader(
        lines,
        delimiter=text_format.separator or separator,
        quoting=text_format.quoting,
        strict=True,
    )
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
            names = [str(cell) for cell in row] if text_format.header else [str(index) for index in range(len(row))]
            place = _column_place(origin, names, text_format)
            if text_format.header:
                continue
        if len(row) != len(names):
            hint = (
                ""
                if text_format.quoting == csv.QUOTE_NONE
                else "; if quotes are ordinary characters there, give --quoting 3"
            )
            raise UserError(f"{origin}:{before + 1}: expected {len(names)} fields, found {len(row)}{hint}")
        yield Document(str(row[place]), origin, before + 1)


def _column_place(origin: str, names: list[str], text_format: TextFormat) -> int:
    if text_format.column not in names:
        raise no_column(origin, text_format.column, names)
    if names.count(text_format.column) > 1:
        raise UserError(f"{origin}: two columns are called '{text_format.column}'")
    return names.index(text_format.column)


def _parquet(stream: IO[bytes], origin: str, text_format: TextFormat) -> Iterator[Document]:
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
