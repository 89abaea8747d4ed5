"""HTML files. A file is a document; its main text is found by trafilatura."""

import codecs
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from experiment.storage import open_file
from pretrain.cleaning import markup
from pretrain.cleaning.markup import join_surrogates
from pretrain.cleaning.readers import has_suffix
from pretrain.corpus.compression import decompress
from pretrain.corpus.formats import SourceDocument, detect_format

PACKAGES = ("trafilatura",)

_CHARSET = re.compile(rb"(?i)<meta[^>]{1,200}?charset\s*=\s*[\"']?\s*([\w:.-]+)")
_HEAD_BYTES = 1 << 12
_BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_SUPERSETS = {
    "ascii": "cp1252",
    "big5": "big5hkscs",
    "euc_kr": "cp949",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "iso8859-11": "cp874",
    "shift_jis": "cp932",
    "tis-620": "cp874",
}  # https://encoding.spec.whatwg.org/#names-and-labels, with Python's names


def matches(name: str) -> bool:
    return has_suffix(name, ".html", ".htm", ".xhtml")


def read(name: str) -> Iterator[SourceDocument]:
    with open_file(name) as file:
        content = decompress(file, detect_format(name)[1]).read(markup.MAX_PAGE_BYTES + 1)
    if len(content) > markup.MAX_PAGE_BYTES:
        yield too_large(name, 1, {})
    else:
        yield SourceDocument(decode_page(content), name, 1, {}, "html")


def too_large(name: str, number: int, metadata: dict[str, Any]) -> SourceDocument:
    """Return the document in place of a page that is dropped. number: in the file."""
    return SourceDocument(f"more than {markup.MAX_PAGE_BYTES:,} bytes", name, number, metadata, markup.TOO_LARGE)


def decode_page(content: bytes, charset: str = "") -> str:
    """Return the text of a page, in the encoding of its byte order mark, else the one that its server gives (charset)
    or the page itself; otherwise in UTF-8, or in the encoding that its bytes suggest."""
    from trafilatura.utils import decode_file

    mark = next((name for mark, name in _BYTE_ORDER_MARKS.items() if content.startswith(mark)), "")
    found = _CHARSET.search(content, 0, _HEAD_BYTES)
    declared = found[1].decode().lower() if found else ""
    if declared.startswith("utf-16"):  # whose bytes would not match
        declared = "utf-8"
    for label in filter(None, (mark, charset, declared)):
        with suppress(LookupError, ValueError):  # an unknown name
            name = codecs.lookup(label).name
            # Python knows encodings, such as UTF-7, that give surrogates.
            return join_surrogates(content.decode(_SUPERSETS.get(name, name), "replace"))
    return str(decode_file(content))
