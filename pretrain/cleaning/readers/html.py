"""HTML files. A file is a document; its main text is found by trafilatura."""

import gzip
from collections.abc import Iterator

from experiment.storage import open_file
from pretrain.cleaning.readers import RawDocument, has_suffix

PACKAGES: tuple[str, ...] = ("trafilatura",)


def matches(name: str) -> bool:
    return has_suffix(name, ".html", ".htm", ".xhtml")


def read(name: str) -> Iterator[RawDocument]:
    with open_file(name) as file:
        content = file.read()
    content = gzip.decompress(content) if name.lower().endswith(".gz") else content
    yield RawDocument(content.decode("utf-8", "replace"), name, 1, {}, "html")
