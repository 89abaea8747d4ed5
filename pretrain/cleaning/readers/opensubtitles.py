"""OpenSubtitles in the XML of OPUS (Lison and Tiedemann 2016): files, or a zip of them. A film is a document."""

import zipfile
from collections.abc import Iterator
from posixpath import basename
from typing import IO
from xml.etree import ElementTree

from experiment.errors import UserError
from experiment.storage import open_file
from pretrain.cleaning.readers import has_suffix, zip_members
from pretrain.corpus.compression import decompress
from pretrain.corpus.formats import Document

PACKAGES: tuple[str, ...] = ()


def matches(name: str) -> bool:
    is_file = has_suffix(name, ".xml") and "wiki" not in basename(name).lower()
    return is_file or any(member.endswith((".xml", ".xml.gz")) for member in zip_members(name))


def read(name: str) -> Iterator[Document]:
    """One document for each film, with a line for each sentence."""
    with open_file(name) as file:
        if not name.lower().endswith(".zip"):
            yield Document(_film(file, name, name), name, 1)
            return
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if info.filename.endswith((".xml", ".xml.gz")):
                    origin = f"{name}::{info.filename}"
                    with archive.open(info) as member:
                        yield Document(_film(member, info.filename, origin), origin, 1)


def _film(stream: IO[bytes], name: str, origin: str) -> str:
    lines = []
    content = decompress(stream, name.rpartition(".")[2])
    try:
        for _, element in ElementTree.iterparse(content):
            if element.tag == "s":
                words = [word.text or "" for word in element.iter("w")]
                lines.append(" ".join(words or "".join(element.itertext()).split()))
                element.clear()
    except ElementTree.ParseError as error:
        raise UserError(f"{origin}: invalid XML: {error}") from None
    return "\n".join(filter(None, lines))
