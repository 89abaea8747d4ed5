"""The Cornell Movie-Dialogs Corpus (Danescu-Niculescu-Mizil and Lee 2011): `movie_conversations.txt`, with
`movie_lines.txt` in the same folder or zip. A conversation is a document, with a line for each turn."""

import ast
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

from experiment.errors import UserError
from pretrain.cleaning.readers import RawDocument, zip_members

_CONVERSATIONS, _LINES = "movie_conversations.txt", "movie_lines.txt"
_SEPARATOR = " +++$+++ "

PACKAGES: tuple[str, ...] = ()


def matches(path: Path) -> bool:
    # movie_lines.txt is read with the conversations, not as text of its own.
    return path.name in (_CONVERSATIONS, _LINES) or any(_is(name, _CONVERSATIONS) for name in zip_members(path))


def read(path: Path) -> Iterator[RawDocument]:
    if path.name == _LINES:
        return
    turns = {cells[0]: cells[4] if len(cells) > 4 else "" for _, cells in _rows(path, _LINES, 4)}
    for number, cells in _rows(path, _CONVERSATIONS, 4):
        try:
            names = ast.literal_eval(cells[3])
            text = "\n".join(turns[name] for name in names)
        except (ValueError, SyntaxError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: expected a list of lines of {_LINES}, found {cells[3][:60]}") from None
        yield RawDocument(text, str(path), number)


def _rows(path: Path, name: str, fewest: int) -> Iterator[tuple[int, list[str]]]:
    """The cells of each line. Raises UserError for a missing file, and for a line with too few cells."""
    for number, line in enumerate(io.StringIO(_content(path, name).decode("iso-8859-1")), 1):
        cells = line.rstrip("\r\n").split(_SEPARATOR)
        if len(cells) < fewest:
            raise UserError(
                f"{path}: {name}:{number}: expected {fewest} cells with '{_SEPARATOR.strip()}' between them"
            )
        yield number, cells


def _content(path: Path, name: str) -> bytes:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            found = next((member for member in zip_members(path) if _is(member, name)), None)
            if found is not None:
                return archive.read(found)
    elif (path.parent / name).is_file():
        return (path.parent / name).read_bytes()
    raise UserError(f"{path}: {name} is missing, which the conversations refer to")


def _is(member: str, name: str) -> bool:
    return member.rpartition("/")[2] == name and not member.startswith("__MACOSX/")
