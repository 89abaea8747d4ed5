"""Formats that `deepcloze corpus` does not read: one file each, found by its name.

A reader has `matches(name)`, whether a file of this name has the format, and `read(path)`, which yields its documents.
It raises UserError with file and place for a file that is damaged.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast


class RawDocument(NamedTuple):
    """A text, and its place in a file."""

    text: str
    origin: str  # file, or archive::member
    number: str  # of the document in it
    metadata: dict[str, Any] = {}


class Reader(Protocol):
    matches: Callable[[str], bool]
    read: Callable[[Path], Iterator[RawDocument]]


def reader_names() -> list[str]:
    """The names of all formats, found without importing them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find_reader(name: str) -> Reader:
    """The reader of this name, one of `reader_names`."""
    return cast(Reader, importlib.import_module(f"{__name__}.{name}"))


def reader_of(file: str) -> Reader | None:
    """The reader for a file of this name; None if `deepcloze corpus` reads it."""
    return next((reader for reader in map(find_reader, reader_names()) if reader.matches(file)), None)
