"""Read the documents of all sources, in order: files, members of archives, hub data sets and python-docs."""

import tarfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from experiment.csv_and_jsonl import missing_column
from experiment.errors import UserError
from experiment.progress import progress, terminal
from pretrain.corpus.formats import (
    Document,
    ReadStats,
    cell_document,
    check_is_read,
    decompress,
    explain_read_errors,
    parse_documents,
)
from pretrain.corpus.options import TextOptions
from pretrain.corpus.sources import PYTHON_DOCS, Source, is_selected, is_skipped, report_skipped


def read_documents(sources: Iterable[Source], options: TextOptions, stats: ReadStats) -> Iterator[Document]:
    """Yield all documents that have text. Raises UserError for bad input, naming file and line."""
    for source in sources:
        for document in _read_source(source, options, stats):
            if document.text and not document.text.isspace():
                yield document
            else:
                stats.empty_documents += 1
        stats.file_position = lambda: 0
        stats.finished_bytes += source.bytes or 0
    if options.document_start is not None and stats.start_matches == 0:
        raise UserError(f"--document_start '{options.document_start}' matches no line of the text")


@contextmanager
def reading_progress(label: str, sources: Sequence[Source]) -> Iterator[Callable[[ReadStats, int], None]]:
    """Show how many documents and megabytes of text have been read. Yields a function to call with each document's size
    in bytes."""
    sizes = [source.bytes for source in sources if source.bytes is not None]
    total = sum(sizes) if len(sizes) == len(sources) else None
    documents, text_bytes, bytes_read, started = 0, 0, 0, time.monotonic()

    def describe(done: float) -> str:
        share, megabytes = f"{done / total:.0%}, " if total else "", text_bytes / 1e6
        speed = megabytes / max(time.monotonic() - started, 1e-9)
        return f"{share}{documents:,} documents, {megabytes:,.1f} MB of text, {speed:.1f} MB/s"

    def advance(stats: ReadStats, size: int) -> None:
        nonlocal documents, text_bytes, bytes_read
        documents, text_bytes = documents + 1, text_bytes + size
        if documents % 64 == 0:
            show(stats.bytes_read - bytes_read)
            bytes_read = stats.bytes_read

    with progress(label, total, describe=describe) as show:
        yield advance


def _read_source(source: Source, options: TextOptions, stats: ReadStats) -> Iterator[Document]:
    if source.kind == PYTHON_DOCS:
        from pretrain.corpus.python_docs import read_python_docs

        for doc in read_python_docs():
            yield Document(doc.text, f"{PYTHON_DOCS}:{doc.document}", 1)
    elif source.kind == "hub":
        yield from _read_hub(source, options.column)
    else:
        with explain_read_errors(source.name), Path(source.name).open("rb", buffering=1 << 20) as file:
            stats.file_position = file.tell
            if source.kind == "file":
                yield from parse_documents(file, source.name, source.name, options, stats)
            else:
                yield from _read_archive(file, source, options, stats)


def _read_archive(file: IO[bytes], source: Source, options: TextOptions, stats: ReadStats) -> Iterator[Document]:
    members = _zip_members if source.name.lower().endswith(".zip") else _tar_members
    found, skipped = False, list[str]()

    def is_wanted(name: str) -> bool:
        if is_skipped(name, source.selection):
            skipped.append(name)
        return is_selected(name, source.selection)

    for name, member in members(file, source, is_wanted):
        found = True
        check_is_read(name, f"{source.name}::{name}")
        yield from parse_documents(member, name, f"{source.name}::{name}", options, stats)
    if not found:
        raise UserError(f"{source.name}: no member matches '{source.selection}'")
    report_skipped(source.name, skipped)


def _zip_members(file: IO[bytes], source: Source, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if not info.is_dir() and is_wanted(info.filename):
                try:
                    member = archive.open(info)
                except (RuntimeError, NotImplementedError) as error:  # password, or unknown compression method
                    raise UserError(f"{source.name}::{info.filename}: cannot be unpacked: {error}") from None
                with member:
                    yield info.filename, member


def _tar_members(file: IO[bytes], source: Source, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, IO[bytes]]]:
    compression = {"gz": "gz", "tgz": "gz", "zst": "zst"}.get(source.name.lower().rsplit(".", 1)[-1], "")
    # "r|" streams: each member is read when it is reached, without seeking.
    with tarfile.open(fileobj=decompress(file, compression), mode="r|") as archive:
        for info in archive:
            if info.isfile() and is_wanted(info.name):
                member = archive.extractfile(info)
                assert member is not None
                yield info.name, member


def _read_hub(source: Source, column: str) -> Iterator[Document]:
    """Read what `datasets.load_dataset` loads: `owner/name`, `owner/name/configuration`, or a local folder."""
    import datasets

    name, configuration = source.name, None
    if name.count("/") == 2 and not Path(name).exists():
        name, _, configuration = name.rpartition("/")
    origin = f"hub:{source.name}:{source.selection}"
    if not terminal().is_interactive:
        datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, configuration, split=source.selection)
    except Exception as error:  # each cause (network, name, split, bad file) has its own exception
        raise UserError(f"--source {origin}: datasets cannot load it: {error}") from None
    if column not in rows.column_names:
        raise missing_column(f"hub:{source.name}", column, rows.column_names, "--column")
    row = 0
    for batch in rows.select_columns([column]).iter(batch_size=1000):
        for value in batch[column]:
            row += 1
            yield cell_document(value, origin, row, column)
