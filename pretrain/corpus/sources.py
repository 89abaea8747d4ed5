"""Expand --source into an ordered list of files, archives and data sets, and open them.

Order: sources as given; within a folder or glob, files by name; within an archive, members as stored.
"""

import fnmatch
import glob
import importlib.metadata
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from experiment.config.field_types import expand_home
from experiment.decontamination import is_clean_summary
from experiment.errors import UserError
from experiment.files import json_digest
from pretrain.corpus.formats import WHOLE, Range, check_is_read, detect_format
from pretrain.corpus.options import SourceName

PYTHON_DOCS = "python-docs"
_TAR = (".tar", ".tar.gz", ".tgz", ".tar.zst")


@dataclass(frozen=True, slots=True)
class Source:
    """A file, members of an archive, a hub data set, or the installed documentation."""

    kind: str  # file | archive | hub | python-docs
    name: str  # path, or name of a data set
    selection: str = ""  # archive: which members; hub: which split
    bytes: int | None = None  # size on disk, if known
    version: str = ""  # another one after a change


class Span(NamedTuple):
    """A part of a source."""

    source: Source
    part: Range = WHOLE


def open_source(name: str) -> IO[bytes]:
    """Open a file for reading; it can seek. Raises OSError."""
    return Path(name).open("rb", buffering=1 << 20)


def stat_source(name: str) -> tuple[int, str]:
    """Return the size of a file in bytes, and a version that changes with its content. Raises OSError."""
    found = os.stat(name)  # noqa: PTH116  (a Path per file takes longer)
    return found.st_size, str(found.st_mtime_ns)


def find_sources(named: SourceName) -> tuple[Source, ...]:
    """Expand what `--source` names. Reads nothing.

    Raises UserError for a missing path, a folder or glob without text files, and a file that is named twice.
    """
    sources = [source for item in _split_names(named) for source in _expand(item)]
    seen: dict[tuple[object, str], str] = {}
    for source in sources:
        identity: object = source.name
        if source.kind in ("file", "archive"):
            found = os.stat(source.name)  # noqa: PTH116
            identity = found.st_dev, found.st_ino
        other = seen.get((identity, source.selection))
        if other is not None and os.path.realpath(other) == os.path.realpath(source.name):  # not a hard link
            raise UserError(f"--source names {source.name} twice")
        seen[identity, source.selection] = source.name
    return tuple(sources)


def _split_names(named: SourceName) -> list[str]:
    if isinstance(named, str | Path):
        text = str(named)
        items = [text] if Path(text).exists() else text.split(",")
    else:
        items = [str(item) for item in named]
    items = [expand_home(item.strip()) for item in items if item.strip()]
    if not items:
        raise UserError("--source is empty; expected files, folders or data sets to read")
    return items


def _expand(item: str) -> list[Source]:
    if item == PYTHON_DOCS:
        installed = sorted((found.name, found.version) for found in importlib.metadata.distributions())
        return [Source(PYTHON_DOCS, PYTHON_DOCS, version=json_digest([sys.version, installed]))]
    if item.startswith("hub:"):
        # NAME may be a local folder, but not one with a colon.
        name, _, split = item.removeprefix("hub:").partition(":")
        if not name:
            raise UserError(f"--source {item}: expected hub:NAME or hub:NAME:SPLIT")
        return [Source("hub", name, split or "train")]
    if "::" in item:
        archive, _, members = item.partition("::")
        return [_from_archive(archive, members or "*")]
    path = Path(item)
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return [_from_file(str(path))]
    if glob.has_magic(item):
        names = glob.glob(item, recursive=True)  # noqa: PTH207  (Path.glob takes no absolute patterns)
        found = sorted(name for name in names if os.path.isfile(name))  # noqa: PTH113
        if not found:
            raise UserError(f"--source {item}: no file matches")
        return [_from_file(name) for name in found]
    raise UserError(f"--source {item}: no such file or folder")


def _from_folder(folder: Path) -> list[Source]:
    """Return all files of a known format below `folder`, except hidden ones."""
    known, others = list[str](), list[str]()
    for directory, inside, names in os.walk(folder):
        inside[:] = [name for name in inside if not name.startswith(".")]
        for name in names:
            path = os.path.join(directory, name).removeprefix("./")  # noqa: PTH118
            if not name.startswith(".") and os.path.isfile(path):  # noqa: PTH113
                is_text = detect_format(name)[0] is not None and not is_clean_summary(Path(path))
                (known if is_text else others).append(path)
    if not known:
        raise UserError(
            f"--source {folder}: the folder has no .txt, .jsonl, .csv, .tsv or .parquet files; "
            "name other text files one by one or with a glob"
        )
    report_skipped(folder, len(others), min(others, default=""))
    return [_from_file(path) for path in sorted(known)]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") and part != ".." for part in path.parts)


def _from_file(path: str) -> Source:
    if path.lower().endswith((".zip", *_TAR)):
        return _from_archive(path, "*")
    check_is_read(os.path.basename(path), path)  # noqa: PTH119
    return Source("file", path, "", *stat_source(path))


def _from_archive(path: str, members: str) -> Source:
    if not Path(path).is_file():
        raise UserError(f"--source {path}::{members}: no such archive")
    if not path.lower().endswith((".zip", *_TAR)):
        raise UserError(f"--source {path}::{members}: expected a .zip, {', '.join(_TAR)} before the '::'")
    return Source("archive", path, members, *stat_source(path))


def is_selected(name: str, pattern: str) -> bool:
    """Match an archive member. `*` matches `/` too; alone, it skips hidden files and unknown formats.

    A name may be absolute or contain `..`: members are read where they are, and never unpacked to that path.
    """
    if pattern == "*":
        return detect_format(name)[0] is not None and not _is_hidden_member(name)
    return fnmatch.fnmatchcase(name, pattern)


def is_skipped(name: str, pattern: str) -> bool:
    """Whether a member that is not selected should be reported: nobody has asked to leave it out."""
    return pattern == "*" and not is_selected(name, pattern) and not _is_hidden_member(name)


def _is_hidden_member(name: str) -> bool:
    return _is_hidden(Path(name)) or name.startswith("__MACOSX/")


def report_skipped(where: Path | str, count: int, example: str) -> None:
    """Say how many files or members of other formats are left out."""
    if count:
        print(f"{where}: {count} files of other formats are skipped, such as {example}", file=sys.stderr)
