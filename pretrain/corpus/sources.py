"""Expand --source into an ordered list of files, archives and data sets.

Order: sources as given; within a folder or glob, files by name; within an archive, members as stored.
"""

import fnmatch
import glob
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

from experiment.config.field_types import expand_home
from experiment.decontamination import CLEAN_PAGE, is_clean_summary
from experiment.errors import UserError
from experiment.files import is_unicode, json_digest
from experiment.formatting import counted
from experiment.hub_data import PREFIX, HubData
from experiment.models.hub_names import HubName
from experiment.storage import FileInfo, is_url, join, list_files, stat_file, without_secrets
from pretrain.corpus.formats import (
    WHOLE,
    Range,
    UnreadableError,
    check_supported_format,
    detect_format,
    explain_read_errors,
)
from pretrain.corpus.manifest import MANIFEST, TOKENIZER
from pretrain.corpus.options import SourceName

PYTHON_DOCS = "python-docs"
_MAGIC = re.compile(r"[*?[]")  # of a pattern
MAX_ITEMS = 100  # of --source, whose documents are counted for each
_LOST_AND_FOUND = "lost+found"  # of a disk; only root can read it
_TAR = (".tar", ".tar.gz", ".tgz", ".tar.zst")


@dataclass(frozen=True, slots=True)
class Source:
    """A file, members of an archive, a hub data set, or the installed documentation."""

    kind: str  # file | archive | hub | python-docs
    name: str  # path, URL, or name of a data set
    selection: str = ""  # archive: which members; hub: which split
    bytes: int | None = None  # size on disk, if known
    version: str = ""  # another one after a change
    item: str = ""  # of --source, if items are counted


class Span(NamedTuple):
    """A part of a source."""

    source: Source
    range: Range = WHOLE


@dataclass(frozen=True)
class _Finder:
    """Expands the items of `--source`."""

    key: str  # for messages
    is_read_by_caller: Callable[[str], bool]
    output: Path | None
    pinned: Sequence[HubData]

    def expand(self, item: str) -> list[Source]:
        if item == PYTHON_DOCS:
            # An interrupted uninstallation leaves a folder without a name.
            installed = sorted((package.name, package.version) for package in distributions() if package.name)
            return [Source(PYTHON_DOCS, PYTHON_DOCS, version=json_digest([sys.version, installed]))]
        if item.startswith(PREFIX):
            try:
                data = HubData.parse(item).pinned(self.pinned)
            except UserError as error:
                raise UserError(f"{self.key} {error}") from None
            version = self._folder_version(Path(data.name)) if data.is_folder else data.revision or ""
            return [Source("hub", data.name, data.split, version=version)]
        if "::" in item:
            archive, _, members = item.partition("::")
            return [self._archive(archive, members or "*")]
        if is_url(item):
            return self._below_url(item)
        if os.path.isdir(item):
            return self._folder(Path(item))
        if os.path.isfile(item):
            return [self._file(str(Path(item)))]
        if glob.has_magic(item):
            names = glob.glob(item, recursive=True)
            try:
                _check_readable(item)
            except OSError as error:
                raise self._unreadable(item, error) from None
            files = sorted(filter(_is_file, names))
            found = self._outside_output(files)
            if not found:
                where = f" outside the output {self.output}" if files else ""
                raise UserError(f"{self.key} {item}: no file matches{where}")
            return [self._file(name) for name in found]
        is_name = "/" in item and HubName.parse(item) is not None
        hint = f"; a data set of the Hugging Face Hub is {PREFIX}{item}" if is_name else ""
        raise UserError(f"{self.key} {item}: no such file or folder{hint}")

    def _outside_output(self, names: Sequence[str]) -> list[str]:
        """Leave out files that an earlier run of the command has written to the output."""
        if self.output is None:
            return list(names)
        output = self.output.resolve()
        written = [output, partial_folder(output), output.with_name(f"{output.name}-heldout")]
        folders = set(map(os.path.dirname, names))
        left_out = {folder for folder in folders if any(map(Path(folder).resolve().is_relative_to, written))}
        return [name for name in names if os.path.dirname(name) not in left_out]

    def _below_url(self, url: str) -> list[Source]:
        if "?" in url and url.startswith("http"):
            raise UserError(
                f"{self.key} {without_secrets(url)}: a URL with a query does not tell the format; download the file "
                "first"
            )
        files = list_files(url)
        if url in files:
            return [self._file(url, files[url])]
        start = len(_MAGIC.split(url)[0].rstrip("/"))
        names = [name for name in files if "/." not in name[start:]]  # no hidden ones, as below a local folder
        if glob.has_magic(url):
            return [self._file(name, files[name]) for name in names]
        return self._of_known_formats(url, names, files)

    def _folder_version(self, folder: Path) -> str:
        """Return a digest that changes with the files below a local data set."""
        names = filter(os.path.exists, self._files_below(folder))
        return json_digest(sorted((name, stat_file(name)) for name in names))

    def _folder(self, folder: Path) -> list[Source]:
        """Return all files of a known format below `folder`, except hidden ones."""
        if (folder / MANIFEST).is_file() and (folder / TOKENIZER).is_dir():
            raise UserError(f"{self.key} {folder}: this is a corpus that is already built; expected its source")
        return self._of_known_formats(str(folder), self._files_below(folder), {})

    def _files_below(self, folder: Path) -> list[str]:
        """Return all files below `folder`, except hidden ones. Raises UserError if the output is there too, and for a
        folder that cannot be read."""

        def refuse(error: OSError) -> None:
            raise self._unreadable(str(folder), error)

        found = list[str]()
        seen = set[tuple[int, int]]()  # folders: links may make a circle
        _is_new(str(folder), seen)
        for directory, inside, names in os.walk(folder, onerror=refuse, followlinks=True):
            if self.output is not None and self.output.resolve().is_relative_to(Path(directory).resolve()):
                raise UserError(f"{self.key} {folder}: the output {self.output} is in this folder; name one outside it")
            visible = sorted(name for name in inside if not name.startswith(".") and name != _LOST_AND_FOUND)
            inside[:] = [name for name in visible if _is_new(os.path.join(directory, name), seen)]
            paths = (os.path.join(directory, name).removeprefix("./") for name in names if name[0] != ".")
            found += filter(_is_file, paths)
        return found

    def _unreadable(self, item: str, error: OSError) -> UserError:
        return UserError(f"{self.key} {item}: cannot read {error.filename}: {error.strerror}")

    def _of_known_formats(self, folder: str, names: Iterable[str], files: Mapping[str, FileInfo]) -> list[Source]:
        readable, others = list[str](), list[str]()
        found = set(names)
        for summary in filter(is_clean_summary, tuple(found)):
            found -= {summary, join(os.path.dirname(summary), CLEAN_PAGE)}
        for name in found:
            is_read = detect_format(name)[0] is not None or self.is_read_by_caller(name)
            (readable if is_read else others).append(name)
        if not readable:
            raise UserError(
                f"{self.key} {folder}: the folder has no files of a known format, such as .txt, .jsonl, .csv, .tsv and "
                ".parquet; name other text files one by one or with a glob"
            )
        report_skipped(folder, len(others), min(others, default=""))
        return [self._file(name, files.get(name)) for name in sorted(readable)]

    def _file(self, name: str, info: FileInfo | None = None) -> Source:
        if not is_unicode(name):
            raise UserError(f"{self.key} {os.fsencode(name)!r}: the name of the file is not UTF-8; rename it")
        if not is_url(name) and not os.path.exists(name):
            raise UserError(f"{self.key} {name}: a link to {os.readlink(name)}, which does not exist")
        if not self.is_read_by_caller(name):
            if name.lower().endswith((".zip", *_TAR)):
                return self._archive(name, "*", info)
            check_supported_format(os.path.basename(name), f"{self.key} {name}")
        return Source("file", name, "", *(info or stat_file(name)))

    def _archive(self, name: str, members: str, info: FileInfo | None = None) -> Source:
        if not is_url(name) and not os.path.isfile(name):
            raise UserError(f"{self.key} {name}::{members}: no such archive")
        if not name.lower().endswith((".zip", *_TAR)):
            raise UserError(
                f"{self.key} {without_secrets(name)}::{members}: expected a .zip, {', '.join(_TAR)} before the '::'"
            )
        return Source("archive", name, members, *(info or stat_file(name)))


def find_sources(
    named: SourceName,
    key: str = "--source",
    is_read_by_caller: Callable[[str], bool] = lambda _: False,
    output: Path | None = None,
    pinned: Sequence[HubData] = (),
) -> tuple[Source, ...]:
    """Expand the names in `--source`. Reads nothing.

    Args:
        named: paths, URLs and other names.
        key: where the user gave them, for messages.
        is_read_by_caller: whether a file, by its name, has a further format; it is not opened as text or an archive.
        output: folder that will be written. Unfinished output in a source would be read when the command is run again:
            a glob leaves it out, a folder is refused.
        pinned: data sets whose commits are read if `named` does not say which.

    Raises UserError for a missing path, a folder or glob without text files, and a file that is named twice.
    """
    finder = _Finder(key, is_read_by_caller, output, pinned)
    items = _split_names(named, key)
    are_counted = 1 < len(items) <= MAX_ITEMS
    sources = [
        replace(source, item=item) if are_counted else source for item in items for source in finder.expand(item)
    ]
    seen: dict[tuple[object, str], str] = {}
    for source in sources:
        identity: object = source.name
        if source.kind in ("file", "archive") and not is_url(source.name):
            status = os.stat(source.name)
            identity = status.st_dev, status.st_ino
        other = seen.get((identity, source.selection))
        if other is not None and os.path.realpath(other) == os.path.realpath(source.name):  # not a hard link
            raise UserError(f"{key} names {source.name} twice")
        seen[identity, source.selection] = source.name
    return tuple(sources)


def partial_folder(output: Path) -> Path:
    """Return the folder of an unfinished build or cleaning."""
    return output.with_name(f"{output.name}.partial")


def _split_names(named: SourceName, key: str) -> list[str]:
    if isinstance(named, str | Path):
        text = str(named)
        items = [text] if os.path.exists(text) else text.split(",")
    else:
        items = [str(item) for item in named]
    items = [expand_home(item.strip()).removeprefix("file://") for item in items if item.strip()]
    if not items:
        raise UserError(f"{key} is empty; expected files, folders or data sets to read")
    return items


def _is_file(path: str) -> bool:
    """Return whether the path is a file, or a link to one that is missing: it may not be left out silently."""
    return os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


def _check_readable(pattern: str) -> None:
    """Raise OSError if `glob` leaves out files that may match, because a folder cannot be read."""
    parent, name = os.path.split(pattern)
    if glob.has_magic(parent):
        _check_readable(parent)
    for folder in glob.iglob(os.path.join(pattern if name == "**" else parent, ""), recursive=True):
        if os.path.basename(folder.rstrip("/")) == _LOST_AND_FOUND:
            continue
        with suppress(FileNotFoundError, NotADirectoryError):
            if glob.has_magic(name):
                os.scandir(folder.rstrip("/") or "/").close()
            else:
                os.lstat(folder + name)


def _is_new(folder: str, seen: set[tuple[int, int]]) -> bool:
    """Return whether the folder is not in `seen`, to which this adds it."""
    status = os.stat(folder)
    before = len(seen)
    seen.add((status.st_dev, status.st_ino))
    return len(seen) > before


def is_selected(name: str, pattern: str) -> bool:
    """Match an archive member. `*` matches `/` too; alone, it skips hidden files and unknown formats.

    A name may be absolute or contain `..`: members are read where they are, and never unpacked to that path.
    """
    if pattern == "*":
        return detect_format(name)[0] is not None and not is_hidden_member(name)
    return fnmatch.fnmatchcase(name, pattern)


def is_hidden_member(name: str) -> bool:
    """Return whether an archive member is hidden, or one of the files that macOS adds."""
    is_hidden = any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))
    return is_hidden or name.startswith("__MACOSX/")


def report_skipped(where: str, count: int, example: str) -> None:
    """Say how many files or members of other formats are left out."""
    if count:
        print(f"{where}: skipping {counted(count, 'file')} of other formats, such as {example}", file=sys.stderr)


def check_unchanged(source: Source) -> None:
    """Raise UnreadableError if a file or archive is not the one that was found."""
    if source.kind in ("file", "archive"):
        with explain_read_errors(source.name):
            if stat_file(source.name) != (source.bytes, source.version):
                raise changed_source(source.name)


def changed_source(name: str) -> UnreadableError:
    return UnreadableError(f"{name} changed while it was read; run the command again")
