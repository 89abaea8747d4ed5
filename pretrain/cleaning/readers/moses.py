"""Sentence pairs in the Moses format of OPUS: a zip with `NAME.en-zh.en`, `NAME.en-zh.zh` and perhaps `NAME.en-zh.ids`.

Both sides are read as text of their language. Sentences of one film or book, which the ids name, are one document.
"""

import itertools
import re
import zipfile
from collections.abc import Iterator

from experiment.errors import UserError
from experiment.files import text_lines
from experiment.storage import open_file
from pretrain.cleaning.readers import zip_members
from pretrain.corpus.formats import SourceDocument

_SIDE = re.compile(r"\.(\w+)-(\w+)\.(\w+)$")


def matches(name: str) -> bool:
    return any(map(_language, zip_members(name)))


def read(name: str) -> Iterator[SourceDocument]:
    """Yield a document for each one in the ids, in each `language`; without ids, for each sentence."""
    members = zip_members(name)
    with open_file(name) as file, zipfile.ZipFile(file) as archive:
        for member in filter(_language, members):
            origin, language = f"{name}::{member}", _language(member)
            ids = member.removesuffix(f".{language}") + ".ids"
            column = 0 if member.rsplit(".", 2)[1].startswith(f"{language}-") else 1
            with archive.open(member) as content:
                lines = (line.rstrip("\r\n") for line in text_lines(content, origin))
                films = _films(archive, ids, column, name) if ids in members else None
                pairs = enumerate(lines) if films is None else _paired(films, lines, origin)
                numbered = enumerate(pairs, 1)
                for _, group in itertools.groupby(numbered, key=lambda entry: entry[1][0]):
                    first, *others = group
                    text = "\n".join(line for _, (_, line) in (first, *others))
                    yield SourceDocument(text, origin, first[0], {"language": language})


def _language(name: str) -> str:
    """Return the language of a member; empty if it is another file."""
    found = _SIDE.search(name)
    return found[3] if found and found[3] in found.group(1, 2) else ""


def _films(archive: zipfile.ZipFile, name: str, column: int, path: str) -> Iterator[str]:
    origin = f"{path}::{name}"
    with archive.open(name) as file:
        for number, line in enumerate(text_lines(file, origin), 1):
            cells = line.split("\t")
            if len(cells) < 2:
                raise UserError(f"{origin}:{number}: expected the ids of two documents, found {line.strip()[:60]}")
            yield cells[column]


def _paired(films: Iterator[str], lines: Iterator[str], origin: str) -> Iterator[tuple[str, str]]:
    for number, (film, line) in enumerate(itertools.zip_longest(films, lines), 1):
        if film is None or line is None:
            raise UserError(
                f"{origin}: expected as many lines as in its .ids file; only one of them has line {number:,}"
            )
        yield film, line
