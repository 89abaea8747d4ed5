"""What the user named with --source -> an ordered stream of documents.

The order is: sources as they are named; inside a folder or glob, files by name; inside an archive, members as they lie
in it; inside a file, documents as they stand.
"""

import fnmatch
import glob
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from experiment.errors import UserError
from experiment.tables import missing_column
from pretrain.corpus.formats import (
    Document,
    ReadStats,
    decompressed,
    documents_of,
    format_of,
    refusing_damage,
    text_of,
)
from pretrain.corpus.options import SourceName, TextOptions

PYTHON_DOCS = "python-docs"
_TAR = (".tar", ".tar.gz", ".tgz", ".tar.zst")


@dataclass(frozen=True)
class Source:
    """One thing to read: a file, members of an archive, a data set of the hub, or the installed documentation."""

    kind: str  # file | archive | hub | python-docs
    name: str  # path, or name of the data set
    selection: str = ""  # archive: which members; hub: which split
    bytes: int | None = None  # on disk, where that is known


def find_sources(named: SourceName) -> tuple[Source, ...]:
    """The sources that `--source` names: text with commas, or a tuple. Nothing is read.

    Raises UserError for a path that is not there, a folder or glob without text files, and a file named twice.
    """
    sources = [source for item in _items(named) for source in _expand(item)]
    seen: set[tuple[str, str]] = set()
    for source in sources:
        identity = (
            str(Path(source.name).resolve()) if source.kind in ("file", "archive") else source.name,
            source.selection,
        )
        if identity in seen:
            raise UserError(f"--source names {source.name} twice")
        seen.add(identity)
    return tuple(sources)


def _items(named: SourceName) -> list[str]:
    if isinstance(named, str | Path):
        text = str(named)
        items = [text] if Path(text).exists() else text.split(",")
    else:
        items = [str(item) for item in named]
    items = [item.strip() for item in items if item.strip()]
    if not items:
        raise UserError("--source names nothing to read")
    return items


def _expand(item: str) -> list[Source]:
    if item == PYTHON_DOCS:
        return [Source(PYTHON_DOCS, PYTHON_DOCS)]
    if item.startswith("hub:"):
        # NAME may be a folder, and Windows-like colons don't occur: the split is what follows the last colon.
        name, _, split = item.removeprefix("hub:").partition(":")
        if not name:
            raise UserError(f"--source {item}: expected hub:NAME or hub:NAME:SPLIT")
        return [Source("hub", name, split or "train")]
    if "::" in item:
        archive, _, members = item.partition("::")
        return [_archive(Path(archive), members or "*")]
    path = Path(item)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return [_file(path)]
    if glob.has_magic(item):
        names = glob.glob(item, recursive=True)  # noqa: PTH207  (Path.glob takes no absolute patterns)
        found = sorted(name for name in names if Path(name).is_file())
        if not found:
            raise UserError(f"--source {item}: no file matches")
        return [_file(Path(name)) for name in found]
    raise UserError(f"--source {item}: no such file or folder")


def _folder(folder: Path) -> list[Source]:
    """All files of a known format below `folder`, hidden ones aside."""
    files = [path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(folder))]
    known = sorted((path for path in files if format_of(path.name)[0]), key=lambda path: path.as_posix())
    if not known:
        raise UserError(
            f"--source {folder}: the folder has no .txt, .jsonl, .csv, .tsv or .parquet files; "
            "name other text files one by one or by a glob"
        )
    if len(known) < len(files):
        example = min(path.as_posix() for path in set(files) - set(known))
        print(
            f"{folder}: {len(files) - len(known)} files of other kinds are not read, such as {example}", file=sys.stderr
        )
    return [_file(path) for path in known]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _file(path: Path) -> Source:
    if path.name.lower().endswith((".zip", *_TAR)):
        return _archive(path, "*")
    return Source("file", str(path), bytes=path.stat().st_size)


def _archive(path: Path, members: str) -> Source:
    if not path.is_file():
        raise UserError(f"--source {path}::{members}: there is no archive {path}")
    if not path.name.lower().endswith((".zip", *_TAR)):
        raise UserError(f"--source {path}::{members}: expected a .zip, {', '.join(_TAR)} before the '::'")
    return Source("archive", str(path), members, path.stat().st_size)


def read_documents(sources: Iterable[Source], text_format: TextOptions, stats: ReadStats) -> Iterator[Document]:
    """Every document that has text, in order; those without are counted in `stats`. Raises UserError on bad input."""
    for source in sources:
        for document in _read(source, text_format, stats):
            if document.text and not document.text.isspace():
                yield document
            else:
                stats.empty_documents += 1
        stats.file_position = lambda: 0
        stats.finished_bytes += source.bytes or 0
    if text_format.document_start is not None and stats.start_matches == 0:
        raise UserError(f"--document_start '{text_format.document_start.pattern}' matches no line of the text")


def _read(source: Source, text_format: TextOptions, stats: ReadStats) -> Iterator[Document]:
    if source.kind == PYTHON_DOCS:
        from pretrain.corpus.python_docs.collect import read_python_docs

        for record in read_python_docs():
            yield Document(record.text, f"{PYTHON_DOCS}:{record.document}", 1)
    elif source.kind == "hub":
        yield from _hub(source, text_format)
    else:
        with refusing_damage(source.name), Path(source.name).open("rb", buffering=1 << 20) as file:
            stats.file_position = file.tell
            if source.kind == "file":
                yield from documents_of(file, source.name, source.name, text_format, stats)
            else:
                yield from _members(file, source, text_format, stats)


def _members(file: IO[bytes], source: Source, text_format: TextOptions, stats: ReadStats) -> Iterator[Document]:
    found = 0
    for name, member in (
        _zip_members(file, source) if source.name.lower().endswith(".zip") else _tar_members(file, source)
    ):
        found += 1
        yield from documents_of(member, name, f"{source.name}::{name}", text_format, stats)
    if not found:
        raise UserError(f"{source.name}: no member matches '{source.selection}'")


def _zip_members(file: IO[bytes], source: Source) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if not info.is_dir() and _is_selected(info.filename, source.selection):
                try:
                    member = archive.open(info)
                except (RuntimeError, NotImplementedError) as error:  # a password; a compression Python does not know
                    raise UserError(f"{source.name}::{info.filename}: cannot be unpacked: {error}") from None
                with member:
                    yield info.filename, member


def _tar_members(file: IO[bytes], source: Source) -> Iterator[tuple[str, IO[bytes]]]:
    compression = {"gz": "gz", "tgz": "gz", "zst": "zst"}.get(source.name.lower().rsplit(".", 1)[-1], "")
    # "r|" reads straight on: a member is read when it is passed, and never sought back to.
    with tarfile.open(fileobj=decompressed(file, compression), mode="r|") as archive:
        for info in archive:
            if info.isfile() and _is_selected(info.name, source.selection):
                member = archive.extractfile(info)
                assert member is not None
                yield info.name, member


def _is_selected(name: str, pattern: str) -> bool:
    """`*` also matches `/`; alone, it passes over hidden members and those of unknown kinds."""
    if pattern == "*":
        return format_of(name)[0] is not None and not _is_hidden(Path(name)) and not name.startswith("__MACOSX/")
    return fnmatch.fnmatchcase(name, pattern)


def _hub(source: Source, text_format: TextOptions) -> Iterator[Document]:
    """A data set that `datasets.load_dataset` can load: `owner/name`, `owner/name/configuration`, or a local folder."""
    import datasets

    name, configuration = source.name, None
    if name.count("/") == 2 and not Path(name).exists():
        name, _, configuration = name.rpartition("/")
    try:
        rows = datasets.load_dataset(name, configuration, split=source.selection)
    except Exception as error:  # no network, no such name, no such split, a bad file: each has its own exception there
        raise UserError(f"--source hub:{source.name}:{source.selection}: datasets cannot load it: {error}") from None
    if text_format.column not in rows.column_names:
        raise missing_column(f"hub:{source.name}", text_format.column, rows.column_names, "--column")
    origin, number = f"hub:{source.name}:{source.selection}", 0
    for batch in rows.select_columns([text_format.column]).iter(batch_size=1000):
        for value in batch[text_format.column]:
            number += 1
            yield Document(text_of(value, f"{origin}:{number}", text_format.column), origin, number)
