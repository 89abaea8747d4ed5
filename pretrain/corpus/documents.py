"""Read the documents of sources, in order: files, members of archives, hub data sets and python-docs."""

import io
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, Literal, Self

from experiment.csv_and_jsonl import missing_column
from experiment.errors import UserError, warn_once
from experiment.hub_data import HubData, load_rows, read_cells
from experiment.progress import progress
from experiment.storage import open_file
from pretrain.corpus.compression import decompress
from pretrain.corpus.formats import (
    Members,
    Range,
    ReadStats,
    SourceDocument,
    check_supported_format,
    count_line_breaks,
    detect_format,
    explain_read_errors,
    parse_documents,
    row_document,
)
from pretrain.corpus.options import TextOptions
from pretrain.corpus.sources import PYTHON_DOCS, Source, Span, is_hidden_member, is_selected, report_skipped


def read_documents(spans: Iterable[Span], options: TextOptions, stats: ReadStats) -> Iterator[SourceDocument]:
    """Yield all documents that have text. Raises UserError for bad input, naming file and line."""
    for span in spans:
        for document in _read_span(span, options, stats):
            if document.text.strip():
                yield document
            else:
                stats.empty_documents += 1
        stats.file_position = lambda: 0
        stats.finished_bytes += span.source.bytes or 0


def check_read(
    sources: Sequence[Source], options: TextOptions, start_matches: int, archives: Mapping[str, Members]
) -> None:
    """Report members that were skipped when all sources have been read, and archives without members to read.

    Raises UserError if an item of `--source` has only such archives, and for a pattern that matched no line.
    """
    members_of = {
        source: archives.get(_archive_name(source), Members()) for source in sources if source.kind == "archive"
    }
    matched = {source.item for source in sources if source not in members_of or members_of[source].read}
    for source, members in members_of.items():
        report_skipped(source.name, members.skipped, members.example)
        if members.read == 0:
            problem = f"{source.name}: no member matches '{source.selection}'"
            if source.item not in matched:
                raise UserError(problem)
            warn_once(problem)
    if options.document_start is not None and start_matches == 0:
        raise UserError(f"{options.name('document_start')} '{options.document_start}' matches no line of the text")


@contextmanager
def reading_progress(label: str, total: int | None) -> Iterator[Callable[[int, int, int], None]]:
    """Show how many documents and megabytes of text have been read, and how fast. `total`: bytes on disk, if known.
    Yields a function to call with the bytes on disk, documents and bytes of text that were read since."""
    documents, text_bytes, started = 0, 0, time.monotonic()

    def describe(done: float) -> str:
        share, megabytes = f"{done / total:.0%}, " if total else "", text_bytes / 1e6
        speed = megabytes / max(time.monotonic() - started, 1e-9)
        return f"{share}{documents:,} documents, {megabytes:,.1f} MB of text, {speed:.1f} MB/s"

    def advance(done: int, new_documents: int, new_text_bytes: int) -> None:
        nonlocal documents, text_bytes
        documents, text_bytes = documents + new_documents, text_bytes + new_text_bytes
        show(done)

    with progress(label, total, describe=describe) as show:
        yield advance


def _read_span(span: Span, options: TextOptions, stats: ReadStats) -> Iterator[SourceDocument]:
    source = span.source
    if source.kind == PYTHON_DOCS:
        from pretrain.corpus.python_docs import read_python_docs

        for doc in read_python_docs():
            yield SourceDocument(doc.text, f"{PYTHON_DOCS}:{doc.document}", 1)
    elif source.kind == "hub":
        yield from _read_hub(source, options, span.range)
    else:
        with explain_read_errors(source.name), open_file(source.name) as file:
            stats.file_position = file.tell
            if source.kind == "file":
                yield from parse_documents(file, source.name, source.name, options, stats, span.range)
            else:
                yield from _read_archive(file, span, options, stats)


def locate_lines(span: Span) -> Span:
    """Count the lines before the range, so that reading it again tells the lines of errors. The rows of tables are
    known without. Raises UserError."""
    source, bounds = span
    if source.kind != "file" or bounds.start == 0 or detect_format(source.name)[0] in ("csv", "tsv", "parquet"):
        return span
    with explain_read_errors(source.name), open_file(source.name) as file:
        return Span(source, replace(bounds, line_breaks=count_line_breaks(file, source.name, bounds)))


def _archive_name(source: Source) -> str:
    return f"{source.name}::{source.selection}"


def _read_archive(file: IO[bytes], span: Span, options: TextOptions, stats: ReadStats) -> Iterator[SourceDocument]:
    source = span.source
    members = _zip_members if source.name.lower().endswith(".zip") else _tar_members
    found = stats.archives.setdefault(_archive_name(source), Members())

    def is_wanted(name: str) -> bool:
        if is_selected(name, source.selection):
            return True
        if source.selection == "*" and not is_hidden_member(name):  # no pattern leaves it out
            found.skip(name)
        return False

    for name, member in members(file, span, is_wanted):
        found.read += 1
        check_supported_format(name, f"{source.name}::{name}")
        yield from parse_documents(member, name, f"{source.name}::{name}", options, stats)


def _zip_members(file: IO[bytes], span: Span, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist()[span.range.start : span.range.stop]:
            if not info.is_dir() and is_wanted(info.filename):
                # The lines of a ZipExtFile take several times as long.
                with io.BufferedReader(archive.open(info), 1 << 20) as member:  # type: ignore[type-var]
                    yield info.filename, member


def _tar_members(file: IO[bytes], span: Span, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, IO[bytes]]]:
    source, bounds = span
    _, compression = detect_format(source.name)
    # "r|" streams: each member is read when it is reached, without seeking.
    mode: Literal["r|", "r:"] = "r|" if compression else "r:"
    content = decompress(file, compression)
    # errors: of the names. ignore_zeros: another archive may follow the end of one.
    with _Archive.open(
        fileobj=content, mode=mode, ignore_zeros=True, encoding="utf-8", errors="replace", tarinfo=_Member
    ) as archive:
        for info in archive:
            archive.members.clear()  # type: ignore[attr-defined]  # it would grow with the archive
            if bounds.stop is not None and info.offset >= bounds.stop:
                return
            if info.offset >= bounds.start and info.isfile() and is_wanted(info.name):
                member = archive.extractfile(info)
                assert member is not None
                yield info.name, member
        if archive.has_trailer:
            warn_once(f"{source.name}: what follows the end of the archive is no archive, and is ignored")


class _Archive(tarfile.TarFile):
    has_ended = False  # the block before was an end marker
    has_trailer = False  # something else follows the end of the last archive, such as a checksum or a line end


class _Member(tarfile.TarInfo):
    """Raises ReadError for a damaged header, which `tarfile` takes for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: _Archive) -> Self:  # type: ignore[override]
        header = archive.fileobj.read(tarfile.BLOCKSIZE)
        try:
            member = cls.frombuf(header, archive.encoding, archive.errors)
            archive.has_ended = False
            member.offset = archive.fileobj.tell() - tarfile.BLOCKSIZE
            return member._proc_member(archive)  # type: ignore[attr-defined, no-any-return]
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            archive.has_ended = True
            raise
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:  # type: ignore[attr-defined]
            if not archive.has_ended or header[257:262] == b"ustar":  # a header, even after the end of an archive
                raise tarfile.ReadError(str(error)) from None
            archive.has_trailer = True
            raise tarfile.EmptyHeaderError from None  # type: ignore[attr-defined]  # ends the reading


def hub_data(source: Source) -> HubData:
    data = HubData(source.name, None, source.selection)
    return data if data.is_folder else data._replace(revision=source.version or None)


def _read_hub(source: Source, options: TextOptions, bounds: Range) -> Iterator[SourceDocument]:
    rows, columns = load_rows(hub_data(source)), list(options.columns)
    for column, option in options.columns.items():
        if column not in rows.column_names:
            raise missing_column(f"hub:{source.name}", column, rows.column_names, option)
    for row, cells in enumerate(read_cells(rows, columns, slice(bounds.start, bounds.stop)), start=bounds.start + 1):
        yield row_document(cells, f"hub:{source.name}:{source.selection}", row, columns)
