"""The format of CoNLL-2003 (Tjong Kim Sang & De Meulder 2003): a token and its tags per line, a blank line between
sentences."""

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from experiment.errors import UserError
from finetune.data.formats.row import Row, open_lines

_SEPARATOR = re.compile(r"[ \t]+")


def read_conll(path: Path) -> Iterator[Row]:
    """The sentences of a file. The cells of each are lists with an item for each token.

    They are named by the number of their column, from 0; the first is also called `tokens`, the last `tags`. Fields are
    separated by tabs or, in lines without any, by spaces. Document borders (-DOCSTART-) are skipped.
    """
    width: int | None = None
    with open_lines(path) as lines:
        numbered = ((number, line.strip("\r\n \t")) for number, line in enumerate(lines, 1))
        for is_blank, group in groupby(numbered, lambda pair: not pair[1] or pair[1].startswith("-DOCSTART-")):
            if is_blank:
                continue
            sentence = [(number, _fields(line)) for number, line in group]
            width = width or len(sentence[0][1])
            for number, fields in sentence:
                if len(fields) != width:
                    raise UserError(f"{path}:{number}: expected {width} columns, found {len(fields)}")
            place = f"{path}:{sentence[0][0]}"
            yield Row(place, _names(width), _cells([fields for _, fields in sentence]), place)


def _fields(line: str) -> list[str]:
    return line.split("\t") if "\t" in line else _SEPARATOR.split(line)


def _names(width: int) -> list[str]:
    return [*map(str, range(width)), "tokens", *(["tags"] if width > 1 else [])]


def _cells(rows: list[list[str]]) -> list[list[str]]:
    columns = [list(column) for column in zip(*rows, strict=True)]
    return [*columns, columns[0], *([columns[-1]] if len(columns) > 1 else [])]
