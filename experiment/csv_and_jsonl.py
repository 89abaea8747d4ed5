"""Read CSV and JSON lines strictly and row by row: a malformed row raises UserError with file and line.

`origin` is the name of the file in messages: its path, or archive::member. Lines are counted from 1.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import IO, Any, Literal, NamedTuple

from experiment.errors import UserError, warn_once
from experiment.files import parse_json
from experiment.formatting import counted, shorten
from experiment.unspaced_scripts import HAN

# An unclosed quote swallows the rows after it. No real field is longer than this many characters.
MAX_FIELD = 1 << 27
_MAX_LINE = 1 << 30  # bytes; a compressed file of a megabyte may contain a line that does not fit into memory
_WORDS_OF_A_NAME = re.compile(r"(?:[^\W\d]|#)[\w.()%#/:-]*(?: [\w(#][\w.()%#/:-]*){0,2}")  # '#1 ID', 'score (1-5)'
_MAX_NAME = 40  # characters
_HAN = re.compile(f"[{HAN}]")
_MAX_HAN = 8  # of them in a name, such as 情感类别


@dataclass(frozen=True)
class CsvFormat:
    """Format of a CSV file; quoting and header as in pandas, where quoting 0, 1 and 2 differ only in writing."""

    separator: str | None = None  # None: a comma
    quoting: Literal[0, 1, 2, 3] = 0  # 3: quotes are ordinary characters
    header: bool = True
    as_flags: bool = True  # whether messages call the options --header and so on, or by their key in a config
    on_bad_lines: Literal["error", "skip", "drop_extra"] = "error"  # of another width; skipped ones with a warning
    section: str = "task."  # of the config, before the keys
    rejects_header: bool = False  # without a header: reject a first row that looks like one, instead of a warning

    def option(self, name: str, value: str = "") -> str:
        """Return an option as messages write it, optionally with a value."""
        if self.as_flags:
            return f"--{name} {value}".rstrip()
        return f"{self.section}{name}: {value}" if value else self.section + name


class CsvRow(NamedTuple):
    line: int  # where it begins: a quoted field may hold line breaks
    cells: list[str]
    skipped: int = 0  # rows before it, see `CsvFormat.on_bad_lines`


def raw_lines(stream: IO[bytes], origin: str, first: int = 1) -> Iterator[bytes]:
    """Yield the lines of a file, with their line ends. Raises UserError for a line that is too long to be one. `first`:
    number of the first line."""
    for number, line in enumerate(iter(partial(stream.readline, _MAX_LINE + 1), b""), first):
        if len(line) > _MAX_LINE:
            raise UserError(f"{origin}:{number}: the line has more than {_MAX_LINE:,} bytes; split it")
        yield line


def read_csv(lines: Iterable[str], origin: str, csv_format: CsvFormat) -> tuple[list[str], Iterator[CsvRow]]:
    """Read column names and rows of a CSV file. Empty lines are skipped, and empty cells at the end, as in files of
    Excel.

    Without a header, columns are named "0", "1", …; warns if there seems to be one, and if quotes that seem to enclose
    cells are read as ordinary characters. A file without rows has no columns.
    """
    rows = _csv_rows(lines, origin, csv_format)
    if (first := next(rows, None)) is None:
        return [], rows
    if csv_format.header:
        return first.cells, _of_equal_length(rows, len(first.cells), origin, csv_format)
    second = next(rows, None)
    if second is not None and looks_like_header(first.cells, 1) and not looks_like_header(second.cells, 1):
        place, option = f"{origin}:{first.line}", csv_format.option("header", "0")
        if csv_format.rejects_header:
            raise UserError(
                f"{place}: this row looks like a header ({listed(first.cells)}), but the training data had none; "
                f"if it is one, set {option}; if it is data, set {csv_format.option('header', 'none')}"
            )
        warn_once(f"{place}: this row is read as data; if it is a header ({listed(first.cells)}), set {option}")
    names = [str(index) for index in range(len(first.cells))]
    rows = chain([first], [] if second is None else [second], rows)
    return names, _of_equal_length(rows, len(names), origin, csv_format)


def looks_like_header(cells: Sequence[str], words: int = 3) -> bool:
    """Return whether cells may be names of columns: distinct, short, of at most 3 `words`, and no numbers."""
    return len(set(cells)) == len(cells) and all(_looks_like_name(cell.strip(), words) for cell in cells)


def _looks_like_name(cell: str, words: int) -> bool:
    fits = len(cell) <= _MAX_NAME and cell.count(" ") < words and not cell.endswith(".")
    fits &= len(_HAN.findall(cell)) <= _MAX_HAN
    return fits and _WORDS_OF_A_NAME.fullmatch(cell) is not None


def _csv_rows(lines: Iterable[str], origin: str, csv_format: CsvFormat) -> Iterator[CsvRow]:
    csv.field_size_limit(MAX_FIELD)
    quoting: Literal[0, 3] = csv.QUOTE_NONE if csv_format.quoting == csv.QUOTE_NONE else csv.QUOTE_MINIMAL
    reader = csv.reader(lines, delimiter=csv_format.separator or ",", quoting=quoting, strict=True)
    line = 1
    suspected = quoting != csv.QUOTE_NONE  # no need to look for quotes that enclose cells
    blank: list[CsvRow] = []  # since the last row with text
    try:
        for cells in reader:
            if cells:
                if not suspected and (quoted := _quoted_cell(cells, is_first=line == 1)):
                    suspected = True
                    warn_once(
                        f"{origin}:{line}: quotes are read as a part of {listed([quoted])}; if they enclose cells, "
                        f"set {csv_format.option('quoting', '0')}"
                    )
                blank.append(CsvRow(line, cells))
                if len(cells) == 1 or any(cells):
                    yield from blank
                    blank.clear()
            line = reader.line_num + 1
    except csv.Error as error:
        if "new-line character" in str(error):
            problem = "a carriage return (\\r) inside a cell; remove it, or convert line ends with tr '\\r' '\\n'"
            raise UserError(f"{origin}:{line}: {problem}") from None
        problem = str(error).replace("\t", "\\t")  # the separator that was expected
        raise UserError(f"{origin}:{line}: malformed row: {problem}{_quoting_hint(csv_format)}") from None


def _quoted_cell(cells: Sequence[str], is_first: bool) -> str | None:
    """Return a cell whose quotes seem to enclose it: with doubled quotes inside, or in a first row where all cells have
    them. Other texts may begin and end with a quotation."""
    quoted = [cell for cell in cells if _is_quoted(cell)]
    if is_first and len(quoted) == len(cells):
        return quoted[0]
    return next((cell for cell in quoted if '"' in cell[1:-1]), None)


def _is_quoted(cell: str) -> bool:
    """Return whether quotes enclose the cell, and those inside are doubled."""
    return len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', "")


def _of_equal_length(rows: Iterator[CsvRow], length: int, origin: str, csv_format: CsvFormat) -> Iterator[CsvRow]:
    skipped: list[int] = []
    for row in rows:
        if len(row.cells) == length:
            yield CsvRow(row.line, row.cells, len(skipped))
        elif csv_format.on_bad_lines == "drop_extra" and len(row.cells) > length:
            yield CsvRow(row.line, row.cells[:length])
        elif csv_format.on_bad_lines == "skip":
            skipped.append(row.line)
        else:
            raise UserError(
                f"{origin}:{row.line}: expected {counted(length, 'column')}, found {len(row.cells)}"
                f"{_quoting_hint(csv_format)}"
            )
    if skipped:
        count, width = counted(len(skipped), "row"), counted(length, "column")
        warn_once(f"{origin}: skipped {count} of another width than {width}, such as line {skipped[0]}")


def _quoting_hint(csv_format: CsvFormat) -> str:
    if csv_format.quoting == csv.QUOTE_NONE:
        advice = f"if quotes enclose cells, set {csv_format.option('quoting', '0')}"
    else:
        advice = f"if quotes are ordinary characters, set {csv_format.option('quoting', '3')}"
    return f"{_separator_hint(csv_format)}; {advice}"


def _separator_hint(csv_format: CsvFormat) -> str:
    return f"; is the separator {csv_format.separator or ','!r}? If not, set {csv_format.option('sep')}"


def read_json_lines(lines: Iterable[str], origin: str, first: int = 1) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, object) of a file with one object per line, without empty lines. first: number of its first line."""
    for number, line in enumerate(map(str.strip, lines), first):
        if not line:
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            problem = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise UserError(f"{origin}:{number}: expected one JSON object per line: {problem}") from None
        if not isinstance(row, dict):
            raise UserError(f"{origin}:{number}: expected one JSON object per line, found {line[:60]}")
        yield number, row


def column_index(names: Sequence[str], column: str, place: str, key: str, csv_format: CsvFormat | None = None) -> int:
    """Return the position of a column. place: file, perhaps with line; key: the option that names the column;
    csv_format: if the file is a CSV file."""
    if column not in names:
        raise missing_column(place, column, names, key, header_advice(csv_format, names))
    if names.count(column) > 1:
        raise UserError(f"{place}: {names.count(column)} columns are called '{column}' ({key} names the column)")
    return names.index(column)


def header_advice(csv_format: CsvFormat | None, names: Sequence[str]) -> str:
    """Return advice if the names of columns come from the first row of a CSV file; otherwise empty."""
    if csv_format is None or not csv_format.header:
        return ""
    option = csv_format.option("header", "none")
    is_unsplit = len(names) == 1 and any(mark in names[0] for mark in ",;|\t")
    separator = _separator_hint(csv_format) if is_unsplit else ""
    return f"{separator}; if the first row is data, set {option} and name columns by their numbers, from 0"


def missing_column(place: str, column: str, names: Iterable[str], key: str, advice: str = "") -> UserError:
    return UserError(f"{place}: no column '{column}'; found: {listed(names)} ({key} names the column){advice}")


def listed(names: Iterable[object]) -> str:
    """Return the names of columns, or cells, on one line of a message."""
    return ", ".join(shorten(" ".join(str(name).split()), _MAX_NAME) for name in names)


def unexpected_cell(place: str, column: str, value: object, expected: str = "text", hint: str = "") -> UserError:
    found = json.dumps(value, default=str, ensure_ascii=False)[:60]
    return UserError(f"{place}: expected {expected} in '{column}', found {found}{hint}")
