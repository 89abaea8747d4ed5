"""Formats that `deepcloze corpus` does not read: one file each, found by its name.

A reader has `matches(name)`, whether a file, a path or URL, has the format, by its name or its members' names, and
`read(name)`, which yields its documents. `read` raises UserError with file and place for a file that is damaged.
`PACKAGES` are those of the extra `clean` that it imports, if there are any.
"""

import importlib
import pkgutil
import zipfile
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import IO, Protocol, cast

from experiment.storage import open_file
from pretrain.corpus.formats import SourceDocument
from pretrain.corpus.sources import is_hidden_member


class Reader(Protocol):
    matches: Callable[[str], bool]
    read: Callable[[str], Iterator[SourceDocument]]


@cache
def reader_names() -> tuple[str, ...]:
    """Return the names of all formats, found without importing them."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def find_reader(name: str) -> Reader:
    """Return the reader of this name, one of `reader_names`."""
    return cast(Reader, importlib.import_module(f"{__name__}.{name}"))


@lru_cache(maxsize=16)
def reader_of(name: str) -> Reader | None:
    """Return the reader for a file; None if it is a file for `deepcloze corpus`."""
    return next((reader for reader in map(find_reader, reader_names()) if reader.matches(name)), None)


def has_suffix(name: str, *suffixes: str) -> bool:
    """Return whether the name ends in one of the suffixes, perhaps with .gz or .zst after it."""
    return name.lower().removesuffix(".gz").removesuffix(".zst").endswith(suffixes)


def open_members(name: str, is_wanted: Callable[[str], object]) -> Iterator[tuple[str, str, IO[bytes]]]:
    """Open a file, or one after another the members of a zip that are wanted. Yields their names, their origins for
    messages, and their contents."""
    with open_file(name) as file:
        if not name.lower().endswith(".zip"):
            yield name, name, file
            return
        with zipfile.ZipFile(file) as archive:
            for inside in filter(is_wanted, zip_members(name)):
                with archive.open(inside) as member:
                    yield inside, f"{name}::{inside}", member


@lru_cache(maxsize=16)
def zip_members(name: str) -> tuple[str, ...]:
    """Return the names of the files in a zip, without hidden ones; none if the file is not a zip, or damaged, which
    reading it will tell."""
    if not name.lower().endswith(".zip"):
        return ()
    try:
        with open_file(name) as file, zipfile.ZipFile(file) as archive:
            return tuple(name for name in archive.namelist() if not (name.endswith("/") or is_hidden_member(name)))
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile):
        return ()
