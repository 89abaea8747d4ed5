"""OpenSubtitles in the XML of OPUS (Lison and Tiedemann 2016): files, or a zip of them. A film is a document."""

from collections.abc import Iterator
from typing import IO
from xml.etree import ElementTree

import regex

from experiment.errors import UserError
from experiment.unspaced_scripts import UNSPACED, WIDE
from pretrain.cleaning.readers import has_suffix, open_members, wikipedia, zip_members
from pretrain.corpus.compression import decompress
from pretrain.corpus.formats import SourceDocument, detect_format

# Between tokens.
_NO_SPACE = regex.compile(
    rf"(?<=[{UNSPACED}]) (?=[{UNSPACED}\p{{P}}])|(?<=\p{{P}}) (?=[{UNSPACED}])|(?<=[{WIDE}]) | (?=[{WIDE}])"
)


def matches(name: str) -> bool:
    is_file = _is_film(name) and not wikipedia.matches(name)
    members = zip_members(name)
    has_films = any(map(_is_film, members))
    return is_file or (has_films and not any(detect_format(member)[0] for member in members))


def read(name: str) -> Iterator[SourceDocument]:
    """Yield a document for each film, with a line for each sentence."""
    for file, origin, content in open_members(name, _is_film):
        yield SourceDocument(_film(content, file, origin), origin, 1)


def _is_film(member: str) -> bool:
    return has_suffix(member, ".xml")


def _film(stream: IO[bytes], name: str, origin: str) -> str:
    lines = []
    content = decompress(stream, detect_format(name)[1])
    try:
        events = ElementTree.iterparse(content, events=("start", "end"))
        _, root = next(events)
        if root.tag != "document":  # another file may be larger than memory
            raise UserError(f"{origin}: expected the XML of OpenSubtitles, <document> with <s>, found <{root.tag}>")
        for event, element in events:
            if event == "end" and element.tag == "s":
                words = [word.text or "" for word in element.iter("w")]
                line = " ".join(words or "".join(element.itertext()).split())
                lines.append(_NO_SPACE.sub("", line) if words else line)
                element.clear()
    except ElementTree.ParseError as error:
        raise UserError(f"{origin}: invalid XML: {error}") from None
    return "\n".join(filter(None, lines))
