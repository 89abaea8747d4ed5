"""Split one file, or a range of it, into documents: plain text, JSON lines, CSV, TSV or Parquet, possibly compressed.

A line ends at "\n" or "\r\n" only, not at Unicode line separators. Only the line end is removed. Bytes that are not
UTF-8 are rejected, naming the line.
"""

import io
import itertools
import lzma
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Any, Literal, NamedTuple

import regex
import zstandard

from experiment.csv_and_jsonl import (
    CsvFormat,
    column_index,
    missing_column,
    raw_lines,
    read_csv,
    read_json_lines,
    unexpected_cell,
)
from experiment.errors import UserError, reason
from experiment.files import text_lines
from experiment.parquet import open_parquet, parquet_rows
from experiment.storage import is_url
from pretrain.corpus.compression import MemberReader, decompress, find_member
from pretrain.corpus.options import TextOptions

# .raw and .tokens are WikiText's names for plain text.
_FORMAT_OF = {
    **dict.fromkeys(("txt", "text", "raw", "tokens"), "text"),
    **dict.fromkeys(("jsonl", "ndjson", "json"), "jsonl"),
    **{name: name for name in ("csv", "tsv", "parquet")},
}
_MAX_DOCUMENT = 1 << 30  # characters; a text without the expected blank lines may be larger than memory
_FEW_INVALID, _SHARE_INVALID = 10, 0.05  # lines that are not UTF-8; text with more has another encoding
_MATCH_SECONDS = 10.0  # for a line; a pattern that tries all ways to split a line may take years
_CONVERSIONS = {
    "convert it to text, for instance with pandoc": "docx epub odt rtf",
    "read it with `deepcloze clean` (unpack archives first), or convert it to text": "htm html warc wet xhtml xml",
    "convert it to text, for instance with pdftotext": "pdf",
    "convert it to text, for instance with LibreOffice": "doc ppt pptx",
    "convert it to .csv, for instance with LibreOffice": "ods xls xlsx",
    "decompress it": "7z br bz2 lz4 rar xz",
    "unpack it": "tar zip",  # inside another archive
}
# UnicodeDecodeError: of the name of a member of a .zip.
_DAMAGE = (
    *(EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError),
    *(zipfile.BadZipFile, tarfile.TarError, UnicodeDecodeError),
)
_CONVERSION_OF = {suffix: advice for advice, suffixes in _CONVERSIONS.items() for suffix in suffixes.split()}


class UnreadableError(UserError):
    """A file cannot be read, or has changed meanwhile; its content may be undamaged."""


class SourceDocument(NamedTuple):
    """A text and its place in the source."""

    text: str
    origin: str  # file, or archive::member
    line: int  # first line, or row in Parquet and hub data sets; counted from 1
    metadata: Mapping[str, Any] = {}
    markup: str = ""  # to be removed by `deepcloze clean`, see `pretrain.cleaning.markup`

    @property
    def place(self) -> str:
        return f"{self.origin}:{self.line}"

    def utf8(self) -> bytes:
        """Return the text in UTF-8. Raises UserError if it cannot be encoded."""
        try:
            return self.text.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{self.place}: expected Unicode text, found half of a surrogate pair; `deepcloze clean` replaces it"
            ) from None


Unit = Literal["bytes", "compressed", "row groups", "members", "rows"]


@dataclass(frozen=True, slots=True)
class Range:
    """A part of a source. The ranges of a source, one after another, give each of its documents once.

    A line belongs to the range with the line break before it, the first line to the first range. A document of several
    lines belongs to the range of the blank line before it, or of its own first line if a pattern tells where documents
    start.
    """

    unit: Unit = "bytes"  # bytes: of the decompressed content; compressed: of the file; members: of a .zip
    start: int = 0
    stop: int | None = None  # None: to the end
    line_breaks: int | None = None  # before `start`; None: not known, lines are counted from the start of the range


WHOLE = Range()


@dataclass
class Members:
    """Counts of the members of an archive that were read."""

    read: int = 0
    skipped: int = 0  # of other formats
    example: str = ""  # a skipped one

    def skip(self, name: str) -> None:
        self.skipped, self.example = self.skipped + 1, min(self.example or name, name)

    def add(self, other: "Members") -> None:
        self.read, self.skipped = self.read + other.read, self.skipped + other.skipped
        self.example = min(filter(None, (self.example, other.example)), default="")


@dataclass
class ReadStats:
    """Counters that the readers update while documents are drawn from them."""

    empty_documents: int = 0  # dropped because they have no text
    finished_bytes: int = 0  # sizes on disk of the files read so far
    start_matches: int = 0  # lines that matched `document_start`
    archives: dict[str, Members] = field(default_factory=dict)  # by name::selection
    invalid_lines: Counter[str] | None = None  # lines that are not UTF-8, by file; None: they are rejected
    invalid: int = 0  # lines that are not UTF-8, of all files
    lines: int = 0  # of all files but those of Parquet
    file_position: Callable[[], int] = lambda: 0  # bytes read of the current file

    @property
    def bytes_read(self) -> int:
        return self.finished_bytes + self.file_position()


def detect_format(name: str) -> tuple[str | None, str]:
    """Tell from a file name its format (text, jsonl, csv, tsv, parquet or None) and compression (gz, zst or "")."""
    suffix, compression = _suffixes(name)
    return _FORMAT_OF.get(suffix), compression


def _suffixes(name: str) -> tuple[str, str]:
    """Return the suffixes of the format and of the compression; empty if there is none."""
    *suffixes, last = ["", *name.lower().split(".")[1:]]
    if last == "tgz":
        return "tar", "gz"
    return (suffixes[-1], last) if suffixes and last in ("gz", "zst") else (last, "")


def check_supported_format(name: str, origin: str) -> None:
    """Raise UserError for a format that is not read, such as .pdf."""
    suffix = "xml" if name.lower().endswith(".xml.bz2") else _suffixes(name)[0]  # a dump of Wikipedia
    if suffix in _CONVERSION_OF:
        raise UserError(f"{origin}: .{suffix} files are not read; {_CONVERSION_OF[suffix]}")


def parse_documents(
    stream: IO[bytes], name: str, origin: str, options: TextOptions, stats: ReadStats, bounds: Range = WHOLE
) -> Iterator[SourceDocument]:
    """Yield the documents of a file, or of a range of it, in order. If its name tells no format, it is plain text."""
    file_format, compression = detect_format(name)
    with explain_read_errors(origin):
        if file_format == "parquet":
            # Parquet has its index at the end, and only plain files are seekable.
            seekable = not compression and origin == name
            stream = stream if seekable else _copy_to_disk(decompress(stream, compression), origin)
            yield from _parse_parquet(stream, origin, options, bounds)
        elif file_format in ("csv", "tsv"):
            separator = options.sep or ("," if file_format == "csv" else "\t")
            csv_format = CsvFormat(separator, options.quoting, options.header != "none", options.are_flags, section="")
            lines = Lines(decompress(stream, compression), lambda: None, origin, WHOLE, stats)
            yield from _parse_csv(lines, csv_format, options, bounds)
        else:
            lines = Lines(*_open_range(stream, compression, bounds), origin, bounds, stats)
            if file_format == "jsonl":
                yield from _parse_json_lines(lines, options)
            else:
                yield from _parse_text(lines, options, stats)


def _open_range(stream: IO[bytes], compression: str, bounds: Range) -> tuple[IO[bytes], Callable[[], int | None]]:
    """Open the content of a file at the start of a range. Returns it, and a function that gives the end of the range,
    as a position in the content that is counted from there."""
    if bounds.unit == "compressed":
        assert bounds.stop is not None
        member = find_member(stream, compression, bounds.start, bounds.stop) if bounds.start else 0
        if member is None:
            return io.BytesIO(), lambda: 0
        stream.seek(member)
        members = MemberReader(stream, compression, bounds.stop)
        return io.BufferedReader(members, 1 << 20), lambda: members.end
    length = None if bounds.stop is None else bounds.stop - bounds.start
    if compression:
        stream = decompress(stream, compression)
        _skip(stream, bounds.start)
    elif bounds.start:
        stream.seek(bounds.start)
    return stream, lambda: length


def _skip(stream: IO[bytes], size: int) -> int:
    """Read `size` bytes, or to the end, and return the number of line breaks in them."""
    line_breaks = 0
    while size and (block := stream.read(min(size, 1 << 20))):
        line_breaks += block.count(b"\n")
        size -= len(block)
    return line_breaks


def count_line_breaks(file: IO[bytes], name: str, bounds: Range) -> int:
    """Count the line breaks of a file before the start of a range, to tell the line of an error."""
    _, compression = detect_format(name)
    if bounds.unit != "compressed":
        return _skip(decompress(file, compression), bounds.start)
    members, line_breaks = MemberReader(file, compression, bounds.start), 0
    while (block := members.read(1 << 20)) and members.end is None:
        line_breaks += block.count(b"\n")
    return line_breaks


class Lines:
    """The lines of a range, decoded, and those after it for as long as they are read."""

    def __init__(
        self, content: IO[bytes], end: Callable[[], int | None], origin: str, bounds: Range, stats: ReadStats
    ) -> None:
        """`content`: at the start of the range; `end`: returns the position in it where the range ends, None if it has
        not been reached or is the end of the file."""
        self.origin = origin
        self.first = 1 if bounds.start == 0 else 2 + (bounds.line_breaks or 0)
        self.position = 0  # in the content, after the line that was read last
        self.ended = False  # whether that line belongs to a later range
        self._content, self._end, self._in_line = content, end, bounds.start > 0
        self._stats = stats

    def __iter__(self) -> Iterator[str]:
        return text_lines(self._read(), self.origin, self.first, self._take_invalid)

    def _take_invalid(self, line: int, error: UserError) -> None:
        """Count a line that is not UTF-8. Raises UserError if it is rejected, or if there are so many in this file, or
        in all files, that they have another encoding."""
        stats = self._stats
        if stats.invalid_lines is None:
            raise UserError(f"{error}; `deepcloze clean` replaces single bytes") from None
        stats.invalid_lines[self.origin] += 1
        stats.invalid += 1
        for invalid, lines in ((stats.invalid_lines[self.origin], line), (stats.invalid, stats.lines)):
            if invalid > max(_FEW_INVALID, lines * _SHARE_INVALID):
                raise error from None

    def in_range(self) -> Iterator[str]:
        """Yield the lines of the range only."""
        return itertools.takewhile(lambda _: not self.ended, self)

    def _read(self) -> Iterator[bytes]:
        while self._in_line and not self._is_over() and (rest := self._content.readline(1 << 20)):
            self.position += len(rest)
            self._in_line = not rest.endswith(b"\n")
        if self._in_line:
            return
        for line in raw_lines(self._content, self.origin, self.first):
            self.ended = self._is_over()
            self.position += len(line)
            self._stats.lines += 1
            yield line

    def _is_over(self) -> bool:
        end = self._end()
        return end is not None and self.position > end


def row_document(cells: Sequence[object], origin: str, row: int, columns: Sequence[str]) -> SourceDocument:
    """Make a document of the cells in these columns, the text first; null gives an empty one. Raises UserError for
    anything else but text."""
    text = cells[0]
    if text is not None and not isinstance(text, str):
        raise unexpected_cell(f"{origin}:{row}", columns[0], text)
    return SourceDocument(text or "", origin, row, dict(zip(columns[1:], cells[1:], strict=True)))


def _parse_text(lines: Lines, options: TextOptions, stats: ReadStats) -> Iterator[SourceDocument]:
    if options.document == "line" and options.document_start is None:
        for number, line in enumerate(lines.in_range(), lines.first):
            yield SourceDocument(_strip_line_end(line), lines.origin, number)
        return
    pattern = None if options.document_start is None else regex.compile(options.document_start)
    pattern_key = options.name("document_start")
    begun = lines.first == 1  # whether a document of this range has begun
    first, length = 1, 0
    collected: list[str] = []
    for number, raw in enumerate(lines, lines.first):
        line = _strip_line_end(raw)
        is_separator = options.document == "blank_line" and not line.strip()
        is_start = pattern is not None and _matches(pattern, line, f"{lines.origin}:{number}: {pattern_key}")
        if is_separator or is_start:
            if collected:
                yield SourceDocument("\n".join(collected), lines.origin, first)
                collected, length = [], 0
            begun = True
        if lines.ended and (is_separator or is_start or not begun):
            return
        stats.start_matches += is_start
        if begun and not is_separator:
            first = first if collected else number
            collected.append(line)
            length += len(line) + 1
        if length > _MAX_DOCUMENT:
            raise UserError(
                f"{lines.origin}:{first}: the document has more than {_MAX_DOCUMENT:,} characters; split it"
            )
    if collected:
        yield SourceDocument("\n".join(collected), lines.origin, first)


def _matches(pattern: regex.Pattern[str], line: str, place: str) -> bool:
    try:
        return pattern.search(line, timeout=_MATCH_SECONDS) is not None
    except TimeoutError:
        raise UserError(
            f"{place} '{pattern.pattern}' takes longer than {_MATCH_SECONDS:.0f} s on this line; "
            "write it without a repeated group that can match the same text in several ways, such as (a+)+"
        ) from None


def _strip_line_end(line: str) -> str:
    return line.removesuffix("\r\n").removesuffix("\n")  # of which a line has one at most


def _parse_json_lines(lines: Lines, options: TextOptions) -> Iterator[SourceDocument]:
    options_of, columns = options.columns, list(options.columns)
    for number, row in read_json_lines(lines.in_range(), lines.origin, lines.first):
        names = columns
        if _is_cleaned(row):  # some have no metadata, or not all
            kept = row.get("metadata") or {}
            names = [name for name in columns if options_of[name] != "metadata" or name in kept]
            row = {**row, **{name: kept[name] for name in names if options_of[name] == "metadata"}}
        for column in names:
            if column not in row:
                raise missing_column(f"{lines.origin}:{number}", column, row, options_of[column])
        yield row_document([row[column] for column in names], lines.origin, number, names)


def _is_cleaned(row: Mapping[str, Any]) -> bool:
    """Return whether `deepcloze clean` has written a row: its id begins with its source."""
    keys = {"id", "source", "text"}
    is_written = keys <= row.keys() <= {*keys, "metadata"} and isinstance(row.get("metadata") or {}, dict)
    return is_written and str(row["id"]).startswith(f"{row['source']}:")


def _parse_csv(lines: Lines, csv_format: CsvFormat, options: TextOptions, bounds: Range) -> Iterator[SourceDocument]:
    names, rows = read_csv(lines, lines.origin, csv_format)
    if not names:
        return
    columns, named = list(options.columns), options.columns.items()
    places = [column_index(names, column, lines.origin, option, csv_format) for column, option in named]
    # Quoted fields may have line breaks: where a row begins is known only to who has read the rows before it.
    position = lines.position
    for number, cells, _ in rows:
        if bounds.stop is not None and position >= bounds.stop:
            return
        if position >= bounds.start:
            yield row_document([cells[place] for place in places], lines.origin, number, columns)
        position = lines.position


def _parse_parquet(stream: IO[bytes], origin: str, options: TextOptions, bounds: Range) -> Iterator[SourceDocument]:
    import pyarrow

    try:
        file = open_parquet(stream, whole_columns=is_url(origin))
        for column, option in options.columns.items():
            column_index(file.schema_arrow.names, column, origin, option)  # rejects none and several
        groups = range(file.num_row_groups)[bounds.start : bounds.stop]
        columns = list(options.columns)
        for row, cells in parquet_rows(file, lambda row: f"{origin}:{row}", columns, groups):
            yield row_document(cells, origin, row, columns)
    except pyarrow.ArrowException as error:
        raise UserError(f"{origin} is not a Parquet file, or damaged: {error}") from None


def _copy_to_disk(stream: IO[bytes], origin: str) -> IO[bytes]:
    copy = tempfile.TemporaryFile()  # noqa: SIM115  (deleted when it is closed)
    while block := stream.read(1 << 20):
        try:
            copy.write(block)
            copy.flush()
        except OSError as error:
            with suppress(OSError):
                copy.close()  # its buffer cannot be written; Python 3.13 prints a traceback if it is freed unclosed
            raise UnreadableError(
                f"cannot copy {origin} to the temporary folder {tempfile.gettempdir()}: {error.strerror}; set TMPDIR "
                "to another folder"
            ) from None
    return copy


@contextmanager
def explain_read_errors(origin: str) -> Iterator[None]:
    """Turn read, decompression and archive errors into a UserError that names the file: an UnreadableError for an error
    of the system."""
    try:
        yield
    except _DAMAGE as error:
        if isinstance(error.__context__, OSError):  # zipfile takes it for damage
            raise _unreadable(origin, error.__context__) from None
        raise UserError(f"{origin} is damaged or truncated: {error}") from None
    except RuntimeError as error:  # a member of a .zip needs a password, or has an unknown compression method
        raise UserError(f"cannot read {origin}: {error}") from None
    except OSError as error:
        raise _unreadable(origin, error) from None


def _unreadable(origin: str, error: OSError) -> UserError:
    kind = UserError if error.errno is None else UnreadableError  # pyarrow's errors about damage have no number
    return kind(f"cannot read {origin}: {reason(error)}")
