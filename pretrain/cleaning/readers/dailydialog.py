"""DailyDialog (Li et al. 2017): `dialogues_*.txt`, a dialogue per line with `__eou__` after each turn. A dialogue is a
document, with a line for each turn."""

import re
import zipfile
from collections.abc import Iterable, Iterator

from experiment.csv_and_jsonl import text_lines
from experiment.errors import UserError
from experiment.storage import open_file
from pretrain.cleaning.readers import zip_members
from pretrain.corpus.formats import Document

_NAME = re.compile(r"(?:^|/)dialogues_(?:text|train|validation|test)\.txt$")
_END = "__eou__"

PACKAGES: tuple[str, ...] = ()


def matches(name: str) -> bool:
    return any(map(_NAME.search, (name, *zip_members(name))))


def read(name: str) -> Iterator[Document]:
    with open_file(name) as file:
        if name.lower().endswith(".zip"):
            with zipfile.ZipFile(file) as archive:
                for inside in filter(_NAME.search, zip_members(name)):
                    with archive.open(inside) as member:
                        yield from _dialogues(member, f"{name}::{inside}")
        else:
            yield from _dialogues(file, name)


def _dialogues(file: Iterable[bytes], origin: str) -> Iterator[Document]:
    for number, line in enumerate(text_lines(file, origin), 1):
        if line.strip() and _END not in line:
            raise UserError(f"{origin}:{number}: expected turns that end in {_END}, found {line.strip()[:60]}")
        turns = [turn.strip() for turn in line.split(_END)]
        yield Document("\n".join(filter(None, turns)), origin, number)
