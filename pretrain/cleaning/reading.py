"""The documents of all sources, in order, each with an id that no other one has."""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment.config.field_types import expand_home
from experiment.csv_and_jsonl import column_index, missing_column, raw_lines, read_json_lines, text_lines
from experiment.errors import UserError
from experiment.parquet import parquet_rows
from pretrain.cleaning.config import CleanConfig
from pretrain.cleaning.readers import RawDocument, Reader, find_reader, reader_of
from pretrain.cleaning.step import Document, check_installed
from pretrain.corpus.compression import decompress
from pretrain.corpus.documents import check_read, read_documents
from pretrain.corpus.formats import ReadStats, cell_document, detect_format, explain_read_errors
from pretrain.corpus.sources import Source, Span, find_sources


@dataclass(frozen=True)
class Input:
    """One file, or another source of `deepcloze corpus`. reader: of a format that `deepcloze corpus` does not read."""

    name: str
    reader: Reader | None
    sources: tuple[Source, ...] = ()

    @property
    def identity(self) -> list[Any]:
        """What tells whether a source is still the same: its name and size."""
        if self.reader is not None:
            return [self.name, Path(self.name).stat().st_size]
        return [[source.name, source.selection, source.bytes] for source in self.sources]


def find_inputs(config: CleanConfig) -> list[Input]:
    """Expand `source`. Raises UserError for what does not exist."""
    items = (config.source,) if isinstance(config.source, str) else config.source
    names = [part for item in items for part in ([item] if Path(item).exists() else item.split(","))]
    inputs = [found for name in names for found in _expand(expand_home(name.strip()), config)]
    if not inputs:
        raise UserError("source: there is nothing to read")
    return inputs


def read_inputs(inputs: Sequence[Input], config: CleanConfig) -> Iterator[Document]:
    """Yield all documents with text. Raises UserError for bad input, with file and place."""
    seen, last, number = set[str](), "", 0
    stats = ReadStats()
    for found in inputs:
        for raw in _read(found, config, stats):
            if raw.origin in seen if raw.origin != last else raw.number <= number:
                raise UserError(f"source: there are two files called {raw.origin}; rename one")
            seen.add(raw.origin)
            last, number = raw.origin, raw.number
            if raw.text and not raw.text.isspace():
                metadata = {key: raw.metadata[key] for key in config.metadata if key in raw.metadata}
                yield Document(f"{raw.origin}:{raw.number}", raw.origin, _unicode(raw), metadata, raw.markup)
    sources = [source for found in inputs for source in found.sources]
    check_read(sources, config, stats.start_matches, stats.archives)


def _expand(name: str, config: CleanConfig) -> Iterator[Input]:
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path)))
        chosen = [file for file in files if config.format != "auto" or _is_known(file)]
        if not chosen:
            raise UserError(f"source: the folder {name} has no files of a known format")
        for file in chosen:
            yield _input(str(file), config)
    elif glob.has_magic(name) and not path.exists() and "::" not in name:
        matching = sorted(found for found in glob.glob(name, recursive=True) if Path(found).is_file())  # noqa: PTH207
        if not matching:
            raise UserError(f"source: no file matches {name}")
        for found in matching:
            yield _input(found, config)
    else:
        yield _input(name, config)


def _input(name: str, config: CleanConfig) -> Input:
    reader = find_reader(config.format) if config.format != "auto" else reader_of(Path(name))
    if reader is not None:
        if not Path(name).is_file():
            raise UserError(f"source: no such file: {name}")
        check_installed(name, reader.PACKAGES)
        return Input(name, reader)
    return Input(name, None, find_sources((name,)))


def _is_known(path: Path) -> bool:
    return reader_of(path) is not None or detect_format(path.name)[0] is not None


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read(found: Input, config: CleanConfig, stats: ReadStats) -> Iterator[RawDocument]:
    if found.reader is not None:
        with explain_read_errors(found.name):
            yield from found.reader.read(Path(found.name))
        return
    for source in found.sources:
        if config.metadata and source.kind == "file" and detect_format(source.name)[0] in ("jsonl", "parquet"):
            with explain_read_errors(source.name):
                yield from _read_table(Path(source.name), config)
        else:
            for document in read_documents([Span(source)], config, stats):
                yield RawDocument(document.text, document.origin, document.line)


def _read_table(path: Path, config: CleanConfig) -> Iterator[RawDocument]:
    """The rows of a file with the columns in `metadata`."""
    columns, (file_format, compression) = (config.column, *config.metadata), detect_format(path.name)
    with path.open("rb") as file:
        if file_format == "jsonl":
            stream = decompress(file, compression)
            rows = (
                (number, row)
                for number, row in read_json_lines(text_lines(raw_lines(stream, str(path)), str(path)), str(path))
            )
        else:
            import pyarrow.parquet

            table = pyarrow.parquet.ParquetFile(file)
            for column in columns:
                column_index(table.schema_arrow.names, column, str(path), "column or metadata")
            cells = parquet_rows(table, columns)
            rows = ((number, dict(zip(columns, row, strict=True))) for number, row in enumerate(cells, 1))
        for number, row in rows:
            for column in columns:
                if column not in row:
                    raise missing_column(f"{path}:{number}", column, row, "column or metadata")
            text = cell_document(row[config.column], str(path), number, config.column).text
            yield RawDocument(text, str(path), number, {column: row[column] for column in config.metadata})


def _unicode(raw: RawDocument) -> str:
    try:
        raw.text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{raw.origin}:{raw.number}: expected Unicode text, found half of a surrogate pair") from None
    return raw.text
