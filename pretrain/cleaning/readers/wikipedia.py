"""Dumps of MediaWiki, such as `enwiki-latest-pages-articles.xml.bz2`, as published or unpacked."""

import bz2
from collections.abc import Iterator
from posixpath import basename
from xml.etree import ElementTree

from experiment.errors import UserError
from experiment.storage import open_file
from pretrain.cleaning.readers import has_suffix
from pretrain.corpus.compression import decompress
from pretrain.corpus.formats import SourceDocument, detect_format

_ARTICLES = "0"  # the namespace of articles; others are talk, users, templates, …
_FILES, _CATEGORIES = "6", "14"
_LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"

PACKAGES = ("mwparserfromhell",)


def matches(name: str) -> bool:
    file = basename(name).lower()
    return file.endswith(".xml.bz2") or (has_suffix(file, ".xml") and ("wiki" in file or "wiktionary" in file))


def read(name: str) -> Iterator[SourceDocument]:
    """Yield a document for each article, with its `title`; redirects are skipped."""
    number, markup = 0, ""
    try:
        with open_file(name) as file:
            content = bz2.BZ2File(file) if name.lower().endswith(".bz2") else decompress(file, detect_format(name)[1])
            events = ElementTree.iterparse(content, events=("start", "end"))
            _, root = next(events)
            for event, page in events:
                if event == "start" or (not page.tag.endswith("}page") and page.tag != "page"):
                    continue
                number += 1
                markup = markup or _markup(root)
                if page.findtext("{*}ns", _ARTICLES) == _ARTICLES and page.find("{*}redirect") is None:
                    title = page.findtext("{*}title", "")
                    text = page.findtext("{*}revision/{*}text") or ""
                    yield SourceDocument(text, name, number, {"title": title}, markup)
                root.clear()  # it would keep an element for each page
    except ElementTree.ParseError as error:
        raise UserError(f"{name}: invalid XML after {number:,} pages: {error}") from None
    if number == 0:
        raise UserError(f"{name}: expected a dump of MediaWiki, found no <page>")


def _markup(root: ElementTree.Element) -> str:
    """Return the markup of the articles, with the language of the wiki and its names of files and categories."""
    namespaces = root.iterfind("{*}siteinfo/{*}namespaces/{*}namespace")
    names = (found.text for found in namespaces if found.text and found.get("key") in (_FILES, _CATEGORIES))
    return ":".join(("wikitext", root.get(_LANGUAGE, ""), *names))
