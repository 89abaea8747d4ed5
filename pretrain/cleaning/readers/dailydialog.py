"""DailyDialog (Li et al. 2017): `dialogues_*.txt`, a dialogue per line with `__eou__` after each turn. A dialogue is a
document, with a line for each turn."""

import re
from collections.abc import Iterator

from experiment.errors import UserError
from experiment.files import text_lines
from pretrain.cleaning.readers import open_members, zip_members
from pretrain.corpus.formats import SourceDocument

_NAME = re.compile(r"(?:^|/)dialogues_(?:text|train|validation|test)\.txt$")
_END = "__eou__"


def matches(name: str) -> bool:
    return any(map(_NAME.search, (name, *zip_members(name))))


def read(name: str) -> Iterator[SourceDocument]:
    for _, origin, content in open_members(name, _NAME.search):
        for number, line in enumerate(text_lines(content, origin), 1):
            if line.strip() and _END not in line:
                raise UserError(f"{origin}:{number}: expected turns that end in {_END}, found {line.strip()[:60]}")
            turns = [turn.strip() for turn in line.split(_END)]
            yield SourceDocument("\n".join(filter(None, turns)), origin, number)
