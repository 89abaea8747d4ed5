"""The Cornell Movie-Dialogs Corpus (Danescu-Niculescu-Mizil and Lee 2011): `movie_conversations.txt`, with
`movie_lines.txt` in the same folder or zip. A conversation is a document, with a line for each turn."""

import ast
import io
from collections.abc import Iterator
from contextlib import suppress
from posixpath import basename, dirname

from experiment.errors import UserError
from experiment.storage import MissingError, join
from pretrain.cleaning.readers import open_members, zip_members
from pretrain.corpus.formats import SourceDocument

_CONVERSATIONS, _LINES = "movie_conversations.txt", "movie_lines.txt"
_SEPARATOR = " +++$+++ "


def matches(name: str) -> bool:
    # movie_lines.txt is read with the conversations, not as text of its own.
    return basename(name) == _LINES or _CONVERSATIONS in map(basename, (name, *zip_members(name)))


def read(name: str) -> Iterator[SourceDocument]:
    if basename(name) == _LINES:
        _content(name, _CONVERSATIONS)  # nothing would read the lines without them
        return
    turns = {cells[0]: cells[4] if len(cells) > 4 else "" for _, cells in _rows(name, _LINES)}
    for number, cells in _rows(name, _CONVERSATIONS):
        try:
            text = "\n".join(turns[line] for line in ast.literal_eval(cells[3]))
        except (ValueError, SyntaxError, KeyError, TypeError):
            raise UserError(f"{name}:{number}: expected a list of lines of {_LINES}, found {cells[3][:60]}") from None
        yield SourceDocument(text, name, number)


def _rows(path: str, name: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the cells of each line. Raises UserError for a missing file, and for a line with too few cells."""
    for number, line in enumerate(io.StringIO(_content(path, name).decode("iso-8859-1")), 1):
        cells = line.rstrip("\r\n").split(_SEPARATOR)
        if len(cells) < 4:
            raise UserError(f"{path}: {name}:{number}: expected 4 cells with '{_SEPARATOR.strip()}' between them")
        yield number, cells


def _content(path: str, name: str) -> bytes:
    file = path if path.lower().endswith(".zip") else join(dirname(path) or ".", name)
    with suppress(FileNotFoundError, MissingError):
        for _, _, content in open_members(file, lambda member: basename(member) == name):
            return content.read()
    raise UserError(
        f"{path}: the Cornell Movie-Dialogs Corpus is read with {name}, which is not in the same folder or zip; if "
        "this is another file, rename it"
    )
