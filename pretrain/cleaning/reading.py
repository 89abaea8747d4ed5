"""The documents of all sources, in order, each with an id that no other one has."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from experiment.csv_and_jsonl import column_index, missing_column, raw_lines, read_json_lines, text_lines
from experiment.errors import UserError
from experiment.files import json_digest
from experiment.parquet import parquet_rows
from experiment.storage import open_file
from pretrain.cleaning.config import CleanConfig
from pretrain.cleaning.readers import RawDocument, Reader, find_reader, reader_of
from pretrain.cleaning.step import Document, check_installed
from pretrain.corpus.compression import decompress
from pretrain.corpus.documents import check_read, read_documents
from pretrain.corpus.formats import ReadStats, cell_document, detect_format, explain_read_errors
from pretrain.corpus.sources import Source, Span, find_sources, is_unicode


def find_inputs(config: CleanConfig) -> tuple[Source, ...]:
    """Expand `source`. Raises UserError for what does not exist, and for a package that is missing."""
    sources = find_sources(config.source, "source", lambda name: _reader(name, config) is not None, Path(config.output))
    for source in sources:
        if (reader := _reader_of(source, config)) is not None:
            check_installed(source.name, reader.PACKAGES)
    return sources


def identity_of(sources: Sequence[Source]) -> str:
    """A digest that tells whether sources are still the same: their names and sizes."""
    return json_digest([[source.name, source.selection, source.bytes] for source in sources])


def read_inputs(sources: Sequence[Source], config: CleanConfig) -> Iterator[Document]:
    """Yield all documents with text. Raises UserError for bad input, with file and place."""
    seen, last, number = set[str](), "", 0
    stats = ReadStats()
    for source in sources:
        for raw in _read(source, config, stats):
            if raw.origin in seen if raw.origin != last else raw.number <= number:
                raise UserError(f"source: there are two files called {raw.origin}; rename one")
            seen.add(raw.origin)
            last, number = raw.origin, raw.number
            if raw.text and not raw.text.isspace():
                metadata = {key: raw.metadata[key] for key in config.metadata if key in raw.metadata}
                yield Document(f"{raw.origin}:{raw.number}", raw.origin, _unicode(raw), metadata, raw.markup)
    check_read(sources, config, stats.start_matches, stats.archives)


def _reader(name: str, config: CleanConfig) -> Reader | None:
    """The reader of a file; None for formats of `deepcloze corpus`."""
    return reader_of(name) if config.format == "auto" else find_reader(config.format)


def _reader_of(source: Source, config: CleanConfig) -> Reader | None:
    return _reader(source.name, config) if source.kind == "file" else None


def _read(source: Source, config: CleanConfig, stats: ReadStats) -> Iterator[RawDocument]:
    reader = _reader_of(source, config)
    if reader is not None:
        with explain_read_errors(source.name):
            yield from reader.read(source.name)
    elif config.metadata and source.kind == "file" and detect_format(source.name)[0] in ("jsonl", "parquet"):
        with explain_read_errors(source.name):
            yield from _read_table(source.name, config)
    else:
        for document in read_documents([Span(source)], config, stats):
            yield RawDocument(document.text, document.origin, document.line)


def _read_table(name: str, config: CleanConfig) -> Iterator[RawDocument]:
    """The rows of a file with the columns in `metadata`."""
    columns, (file_format, compression) = (config.column, *config.metadata), detect_format(name)
    with open_file(name) as file:
        if file_format == "jsonl":
            stream = decompress(file, compression)
            rows = ((number, row) for number, row in read_json_lines(text_lines(raw_lines(stream, name), name), name))
        else:
            import pyarrow.parquet

            table = pyarrow.parquet.ParquetFile(file)
            for column in columns:
                column_index(table.schema_arrow.names, column, name, "column or metadata")
            cells = parquet_rows(table, columns)
            rows = ((number, dict(zip(columns, row, strict=True))) for number, row in enumerate(cells, 1))
        for number, row in rows:
            for column in columns:
                if column not in row:
                    raise missing_column(f"{name}:{number}", column, row, "column or metadata")
            text = cell_document(row[config.column], name, number, config.column).text
            yield RawDocument(text, name, number, {column: row[column] for column in config.metadata})


def _unicode(raw: RawDocument) -> str:
    if not is_unicode(raw.text) or not is_unicode(raw.origin):
        raise UserError(f"{raw.origin}:{raw.number}: expected Unicode text and names, found half of a surrogate pair")
    return raw.text
