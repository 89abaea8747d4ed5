"""The documents of all sources, in order, each with an id that no other one has."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiment.errors import UserError, warn_once
from experiment.files import is_unicode, json_digest
from experiment.formatting import counted
from pretrain.cleaning.config import CleanConfig
from pretrain.cleaning.markup import join_surrogates
from pretrain.cleaning.readers import Reader, find_reader, reader_of
from pretrain.cleaning.step import Document, check_installed
from pretrain.corpus.documents import check_read, read_documents
from pretrain.corpus.formats import ReadStats, SourceDocument, explain_read_errors
from pretrain.corpus.sources import Source, Span, check_unchanged, find_sources


def find_inputs(config: CleanConfig) -> tuple[Source, ...]:
    """Expand `source`. Raises UserError for a missing source or package."""
    sources = find_sources(config.source, "source", lambda name: _reader(name, config) is not None, Path(config.output))
    for source in sources:
        if source.kind == "file" and (reader := _reader(source.name, config)) is not None:
            check_installed(source.name, getattr(reader, "PACKAGES", ()))
    return sources


def identity_of(sources: Sequence[Source]) -> str:
    """Return a digest that tells whether sources are still the same: their names, sizes and versions."""
    return json_digest([[source.name, source.selection, source.bytes, source.version] for source in sources])


def read_inputs(sources: Sequence[Source], config: CleanConfig) -> Iterator[Document]:
    """Yield all documents with text. Raises UserError for bad input, with file and place."""
    seen, last, number, documents = set[str](), "", 0, 0
    invalid, halves = Counter[str](), Counter[str]()  # lines by file
    stats = ReadStats(invalid_lines=invalid)
    for source in sources:
        for raw in _read(source, config, stats):
            if raw.origin in seen if raw.origin != last else raw.line <= number:
                raise UserError(f"source: {raw.origin} is read twice; name it once, or rename one of two files")
            seen.add(raw.origin)
            last, number = raw.origin, raw.line
            if raw.text.strip():
                text = raw.text.replace("\r\n", "\n")  # the steps divide lines and paragraphs at "\n"
                if not is_unicode(text):
                    text = join_surrogates(text)
                    halves[raw.origin] += 1
                metadata = {key: raw.metadata[key] for key in config.metadata if key in raw.metadata}
                if not is_unicode(metadata):
                    raise UserError(f"{raw.place}: expected Unicode text in 'metadata', found half of a surrogate pair")
                documents += 1  # in a Parquet file, too, which has no lines
                yield Document(raw.place, raw.origin, text, metadata, raw.markup)
    check_read(sources, config, stats.start_matches, stats.archives)
    if 1 < stats.invalid > max(stats.lines, documents) / 2:  # a single one may be damaged
        advice = "convert the files first, for instance with iconv -f ENCODING -t UTF-8"
        raise UserError(f"source: most lines are not UTF-8 text, such as in {min(invalid)}; {advice}")
    if replaced := invalid + halves:
        warn_once(
            f"{min(replaced)}{f' and {len(replaced) - 1:,} more' if len(replaced) > 1 else ''}: U+FFFD replaces bytes "
            f"that are not UTF-8, or halves of surrogate pairs, in {counted(replaced.total(), 'line')}"
        )


def _reader(name: str, config: CleanConfig) -> Reader | None:
    """Return the reader of a file; None for formats of `deepcloze corpus`."""
    return reader_of(name) if config.format == "auto" else find_reader(config.format)


def _read(source: Source, config: CleanConfig, stats: ReadStats) -> Iterator[SourceDocument]:
    reader = _reader(source.name, config) if source.kind == "file" else None
    if reader is None:
        yield from read_documents([Span(source)], config, stats)
    else:
        with explain_read_errors(source.name):
            yield from reader.read(source.name)
    check_unchanged(source)
