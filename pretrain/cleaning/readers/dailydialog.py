"""DailyDialog (Li et al. 2017): `dialogues_*.txt`, a dialogue per line with `__eou__` after each turn. A dialogue is a
document, with a line for each turn."""

import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from experiment.csv_and_jsonl import text_lines
from experiment.errors import UserError
from pretrain.cleaning.readers import RawDocument, zip_members

_NAME = re.compile(r"(?:^|/)dialogues_(?:text|train|validation|test)\.txt$")
_END = "__eou__"

PACKAGES: tuple[str, ...] = ()


def matches(path: Path) -> bool:
    return any(map(_NAME.search, (path.name, *zip_members(path))))


def read(path: Path) -> Iterator[RawDocument]:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in filter(_NAME.search, zip_members(path)):
                with archive.open(name) as file:
                    yield from _dialogues(file, f"{path}::{name}")
    else:
        with path.open("rb") as file:
            yield from _dialogues(file, str(path))


def _dialogues(file: Iterable[bytes], origin: str) -> Iterator[RawDocument]:
    for number, line in enumerate(text_lines(file, origin), 1):
        if line.strip() and _END not in line:
            raise UserError(f"{origin}:{number}: expected turns that end in {_END}, found {line.strip()[:60]}")
        turns = [turn.strip() for turn in line.split(_END)]
        yield RawDocument("\n".join(filter(None, turns)), origin, number)
