"""Dumps of MediaWiki: `enwiki-latest-pages-articles.xml.bz2`, and as published or unpacked."""

import bz2
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from xml.etree import ElementTree

from experiment.errors import UserError
from pretrain.cleaning.readers import RawDocument
from pretrain.corpus.compression import decompress

_ARTICLES = "0"  # the namespace of articles; others are talk, users, templates, …

PACKAGES: tuple[str, ...] = ("mwparserfromhell",)


def matches(path: Path) -> bool:
    name = path.name.lower()
    return name.endswith(".xml.bz2") or ("wiki" in name and name.endswith((".xml", ".xml.gz")))


def read(path: Path) -> Iterator[RawDocument]:
    """One document for each article, with its `title`; redirects are skipped."""
    number = 0
    try:
        with _open(path) as file:
            for _, page in ElementTree.iterparse(file):
                if not page.tag.endswith("}page") and page.tag != "page":
                    continue
                number += 1
                if page.findtext("{*}ns", _ARTICLES) == _ARTICLES and page.find("{*}redirect") is None:
                    title = page.findtext("{*}title", "")
                    text = page.findtext("{*}revision/{*}text") or ""
                    yield RawDocument(text, str(path), number, {"title": title}, "wikitext")
                page.clear()
    except ElementTree.ParseError as error:
        raise UserError(f"{path}: invalid XML after {number:,} pages: {error}") from None
    if number == 0:
        raise UserError(f"{path}: expected a dump of MediaWiki, found no <page>")


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".bz2":
        return bz2.open(path)
    return decompress(path.open("rb"), path.suffix.lower().removeprefix("."))
