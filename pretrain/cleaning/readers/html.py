"""HTML files. A file is a document; its main text is found by trafilatura."""

import gzip
from collections.abc import Iterator

from experiment.storage import open_file
from pretrain.cleaning.readers import has_suffix
from pretrain.corpus.formats import Document

PACKAGES: tuple[str, ...] = ("trafilatura",)


def matches(name: str) -> bool:
    return has_suffix(name, ".html", ".htm", ".xhtml")


def read(name: str) -> Iterator[Document]:
    with open_file(name) as file:
        content = file.read()
    content = gzip.decompress(content) if name.lower().endswith(".gz") else content
    yield Document(content.decode("utf-8", "replace"), name, 1, {}, "html")
