"""Expand --source into an ordered list of files, archives and data sets.

Order: sources as given; within a folder or glob, files by name; within an archive, members as stored.
"""

import fnmatch
import glob
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiment.config.field_types import expand_home
from experiment.decontamination import is_clean_summary
from experiment.errors import UserError
from pretrain.corpus.formats import check_is_read, detect_format
from pretrain.corpus.options import SourceName

PYTHON_DOCS = "python-docs"
_TAR = (".tar", ".tar.gz", ".tgz", ".tar.zst")


@dataclass(frozen=True)
class Source:
    """A file, members of an archive, a hub data set, or the installed documentation."""

    kind: str  # file | archive | hub | python-docs
    name: str  # path, or name of a data set
    selection: str = ""  # archive: which members; hub: which split
    bytes: int | None = None  # size on disk, if known


def find_sources(named: SourceName) -> tuple[Source, ...]:
    """Expand what `--source` names. Reads nothing.

    Raises UserError for a missing path, a folder or glob without text files, and a file that is named twice.
    """
    sources = [source for item in _split_names(named) for source in _expand(item)]
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
        return [Source(PYTHON_DOCS, PYTHON_DOCS)]
    if item.startswith("hub:"):
        # NAME may be a local folder, but not one with a colon.
        name, _, split = item.removeprefix("hub:").partition(":")
        if not name:
            raise UserError(f"--source {item}: expected hub:NAME or hub:NAME:SPLIT")
        return [Source("hub", name, split or "train")]
    if "::" in item:
        archive, _, members = item.partition("::")
        return [_from_archive(Path(archive), members or "*")]
    path = Path(item)
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return [_from_file(path)]
    if glob.has_magic(item):
        names = glob.glob(item, recursive=True)  # noqa: PTH207  (Path.glob takes no absolute patterns)
        found = sorted(name for name in names if Path(name).is_file())
        if not found:
            raise UserError(f"--source {item}: no file matches")
        return [_from_file(Path(name)) for name in found]
    raise UserError(f"--source {item}: no such file or folder")


def _from_folder(folder: Path) -> list[Source]:
    """Return all files of a known format below `folder`, except hidden ones."""
    files = [path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(folder))]
    known = [path for path in files if detect_format(path.name)[0] and not is_clean_summary(path)]
    known.sort(key=lambda path: path.as_posix())
    if not known:
        raise UserError(
            f"--source {folder}: the folder has no .txt, .jsonl, .csv, .tsv or .parquet files; "
            "name other text files one by one or with a glob"
        )
    report_skipped(folder, [path.as_posix() for path in set(files) - set(known)])
    return [_from_file(path) for path in known]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") and part != ".." for part in path.parts)


def _from_file(path: Path) -> Source:
    if path.name.lower().endswith((".zip", *_TAR)):
        return _from_archive(path, "*")
    check_is_read(path.name, str(path))
    return Source("file", str(path), bytes=path.stat().st_size)


def _from_archive(path: Path, members: str) -> Source:
    if not path.is_file():
        raise UserError(f"--source {path}::{members}: no such archive")
    if not path.name.lower().endswith((".zip", *_TAR)):
        raise UserError(f"--source {path}::{members}: expected a .zip, {', '.join(_TAR)} before the '::'")
    return Source("archive", str(path), members, path.stat().st_size)


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


def report_skipped(where: Path | str, names: Sequence[str]) -> None:
    """Say how many files or members of other formats are left out."""
    if names:
        print(f"{where}: {len(names)} files of other formats are skipped, such as {min(names)}", file=sys.stderr)
