"""HTML files. A file is a document; its main text is found by trafilatura."""

import gzip
from collections.abc import Iterator
from pathlib import Path

from pretrain.cleaning.readers import RawDocument, has_suffix

PACKAGES: tuple[str, ...] = ("trafilatura",)


def matches(path: Path) -> bool:
    return has_suffix(path, ".html", ".htm", ".xhtml")


def read(path: Path) -> Iterator[RawDocument]:
    content = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    yield RawDocument(content.decode("utf-8", "replace"), str(path), 1, {}, "html")
