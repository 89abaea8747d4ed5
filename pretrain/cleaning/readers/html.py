"""HTML files. A file is a document; its main text is found by trafilatura."""

import re
from collections.abc import Iterator
from contextlib import suppress

from experiment.storage import open_file
from pretrain.cleaning.markup import join_surrogates
from pretrain.cleaning.readers import has_suffix
from pretrain.corpus.compression import decompress
from pretrain.corpus.formats import Document, detect_format

PACKAGES: tuple[str, ...] = ("trafilatura",)

_CHARSET = re.compile(rb"(?i)<meta[^>]{1,200}?charset\s*=\s*[\"']?\s*([\w:.-]+)")
_HEAD_BYTES = 1 << 12
_SUPERSETS = {
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "iso-8859-1": "cp1252",
}  # https://encoding.spec.whatwg.org/#names-and-labels


def matches(name: str) -> bool:
    return has_suffix(name, ".html", ".htm", ".xhtml")


def read(name: str) -> Iterator[Document]:
    with open_file(name) as file:
        content = decompress(file, detect_format(name)[1]).read()
    yield Document(decode_page(content), name, 1, {}, "html")


def decode_page(content: bytes, charset: str = "") -> str:
    """Return the text of a page, in the encoding that its server gives (charset) or the page itself; otherwise in
    UTF-8, or in the encoding that its bytes suggest."""
    from trafilatura.utils import decode_file

    declared = _CHARSET.search(content, 0, _HEAD_BYTES)
    for name in filter(None, (charset, declared[1].decode().lower() if declared else "")):
        with suppress(LookupError, ValueError):  # an unknown name
            # Python knows encodings, such as UTF-7, that give surrogates.
            return join_surrogates(content.decode(_SUPERSETS.get(name, name), "replace"))
    return str(decode_file(content))
