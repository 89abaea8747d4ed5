"""Read the rows of a split, and their cells as the columns of the task declare."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from experiment.csv_and_jsonl import (
    column_index,
    header_advice,
    listed,
    looks_like_header,
    missing_column,
    unexpected_cell,
)
from experiment.errors import UserError, warn_once
from experiment.files import is_unicode, json_digest
from experiment.formatting import counted
from finetune.data.columns import LABEL, WORDS, CellType, Columns
from finetune.data.dialogue import TurnJoiner
from finetune.data.formats import FileFormat, Row, conll_advice, read_rows, separator

_MANY_ROWS = 20  # of which nearly all have one word: a line per word
_MAX_DASHES = 0.1  # share of the rows of a training split that have no label


@dataclass(frozen=True)
class Record:
    """One row of a split, for which a task predicts something."""

    place: str  # file and line, for messages
    values: Mapping[str, Any]  # role -> value; the target is absent if the split has none
    group: str | None = None  # the dialogue that it belongs to
    row: int = 0  # its number in the file or in a drawn split, from 1; rows that are left out count


@dataclass(frozen=True)
class Table:
    """The rows of a split, in order."""

    path: Path
    records: tuple[Record, ...]
    labelled: bool  # whether the records have their targets

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def digest(self) -> str:
        """A checksum of all values, which tells whether two tables are the same data."""
        return json_digest([record.values for record in self.records])


def read_table(
    path: Path,
    columns: Columns,
    file_format: FileFormat | None = None,
    targets_required: bool = True,
    joiner: TurnJoiner | None = None,
    known: Collection[str] = (),
) -> Table:
    """Read a data file, see `formats.read_rows`.

    targets_required: whether to reject a file in which the column of a target is missing or empty. known: labels of
    the task. Unless -1 is one, -1 in all rows means that a split, if it may, has no targets.

    Raises UserError with file and line.
    """
    file_format = file_format or FileFormat()
    records = list(read_records(read_rows(path, file_format), columns, targets_required, joiner))
    if not records:
        raise UserError(f"{path} has no rows")
    is_csv = separator(path, file_format) is not None
    if is_csv:
        _reject_words_as_rows(path, records, columns, conll_advice(file_format.csv))
    if roles := columns.roles(LABEL):
        records = _labelled_or_all(path, records, roles, known, is_csv)
    return _check_targets(path, records, columns.cell_types(), targets_required, "-1" in known)


def target_texts(table: Table, columns: Columns) -> set[str]:
    """Return the targets that are text. A number to predict is none: -1 is one of many, and in all rows means none."""
    values = (record.values.get(role) for role in columns.target_roles() for record in table.records)
    return {value for value in values if isinstance(value, str)}


def _reject_words_as_rows(path: Path, records: Sequence[Record], columns: Columns, advice: str) -> None:
    for role in columns.roles(WORDS):
        single = sum(len(record.values[role]) == 1 for record in records)
        if len(records) >= _MANY_ROWS and single > 0.9 * len(records):
            raise UserError(
                f"{path}: {single:,} of {len(records):,} rows have one word, expected a sentence per row; {advice}"
            )


def _labelled_or_all(
    path: Path, records: list[Record], roles: Sequence[str], known: Collection[str], is_csv: bool
) -> list[Record]:
    """Leave out rows whose label is null, as -1 of the Hub is read, or -, unless all are. SNLI has such rows where
    annotators disagreed; in a CSV file, an empty cell is rather a mistake."""
    has_dash = _dash_means_none(records, roles, known)
    none = [*([] if is_csv else [None]), *(["-"] if has_dash else [])]
    labelled, without = [], []
    for record in records:
        if any(record.values.get(role) in none for role in roles):
            without.append(record.place)
        else:
            labelled.append(record)
    if not without:
        return records
    if not labelled:
        return [replace(record, values={**record.values, **dict.fromkeys(roles)}) for record in records]
    marks, advice = ("null, -1 or -", "; if - is a label, list it in task.labels") if has_dash else ("null or -1", "")
    warn_once(
        f"{path}: left out {counted(len(without), 'row')} without a label ({marks}), such as {without[0]}{advice}"
    )
    return labelled


def _dash_means_none(records: Sequence[Record], roles: Sequence[str], known: Collection[str]) -> bool:
    """Return whether rows have the label - because annotators disagreed, as in SNLI, OCNLI and CMNLI: few rows, beside
    two or more other labels, none of which is +."""
    counts = Counter(record.values.get(role) for record in records for role in roles)
    others = {*known, *counts} - {None, "-"}
    is_rare = bool(known) or counts["-"] <= _MAX_DASHES * len(records)
    return counts["-"] > 0 and "-" not in known and "+" not in others and len(others) > 1 and is_rare


def _check_targets(
    path: Path, records: list[Record], types: Mapping[str, CellType], required: bool, minus_one: bool
) -> Table:
    """Return a table in which all records have their targets or none has."""
    found = {role for record in records for role in record.values}
    targets = [
        role for role, cell_type in types.items() if cell_type.target and (not cell_type.optional or role in found)
    ]
    decisive = [role for role in targets if not types[role].encoded] or targets
    values = [(role, record.values.get(role)) for record in records for role in decisive]
    labelled = any(
        value is not None and (required or minus_one or not types[role].is_hidden(value)) for role, value in values
    )
    for role in targets:
        empty = [record.place for record in records if record.values.get(role) is None]
        if empty and (required or labelled) and not (types[role].optional and types[role].encoded):
            more = f" (and {counted(len(empty) - 1, 'more line')})" if len(empty) > 1 else ""
            raise UserError(f"{empty[0]}{more}: the {role} is empty")
    if not labelled:
        records = [
            replace(record, values={role: value for role, value in record.values.items() if role not in targets})
            for record in records
        ]
    return Table(path, tuple(records), labelled)


def reject_two_spellings(places: Mapping[str, str]) -> None:
    """Raise UserError if a label is another one with a point, such as 1.0, as pandas writes whole numbers beside empty
    cells: the number 1.0 is the label 1, the text stays as it is. places: label -> a row that has it."""
    for label, place in places.items():
        whole, point, digits = label.partition(".")
        if whole in places and whole.removeprefix("-").isdecimal() and point and digits and not digits.strip("0"):
            raise UserError(
                f"{place}: the label '{label}' is the number of another label, '{whole}' ({places[whole]}); write both "
                "the same way, or, if they are two classes, list them in task.labels"
            )


def read_records(
    rows: Iterable[Row],
    columns: Columns,
    targets_required: bool = True,
    joiner: TurnJoiner | None = None,
    section: str = "task.",
) -> Iterator[Record]:
    """Return the rows as records; their targets may be empty. They are read one by one, but all at once with a joiner.

    section: text before the key of a column in messages: `task.`, or `--` for flags. Raises UserError with file and
    line.
    """
    key = f"{section}columns"
    if joiner is None:
        return _records(rows, columns, targets_required, key)
    rows = list(rows)
    records = list(_records(rows, columns, targets_required, key))
    turns = [turn.values for turn in _records(rows, joiner.context, True, f"{section}dialogue")]
    joiner.check_order([record.place for record in records], turns, f"{section}dialogue")
    changes = joiner.join([record.values["text"] for record in records], turns)
    return (
        replace(record, values={**record.values, **changed}, group=turn.get("group"))
        for record, turn, changed in zip(records, turns, changes, strict=True)
    )


def _records(rows: Iterable[Row], columns: Columns, targets_required: bool, key: str) -> Iterator[Record]:
    types = columns.cell_types()
    names: Sequence[str] | None = None
    indices: dict[str, int | list[int]] = {}
    for number, row in enumerate(rows, 1):
        if row.names != names:
            names, indices = row.names, dict(_find_columns(row, columns, types, targets_required, key))
        values = {role: _read_cell(row, types[role], found) for role, found in indices.items()}
        yield Record(row.place, values, row=number + row.skipped)


def _find_columns(
    row: Row, columns: Columns, types: Mapping[str, CellType], targets_required: bool, key: str
) -> Iterator[tuple[str, int | list[int]]]:
    """Yield (role, position of its column, or of each of its columns) for all roles that the row has.

    Spaces around a name do not count. A column may be called by its number, unless that is the name of one. Raises
    UserError for a column that is missing, or is input and target.
    """
    names = [name.strip() for name in row.names]
    numbers = {str(number) for number in range(len(names))} - set(names) if row.csv else set()
    found: dict[str, list[int]] = {}
    advice = header_advice(row.csv, row.names)
    for role, cell_type in types.items():
        asked = [name.strip() for name in columns.names(role)]
        required = not cell_type.target or (targets_required and not cell_type.optional)
        if cell_type is WORDS and row.csv and not {*asked} <= {*names} | numbers:
            more = f"; {conll_advice(row.csv)}{advice}"
            raise missing_column(row.named_at, asked[0], names, f"{key}.{role}", more)
        if required or any(name in names or name in numbers for name in asked):
            found[role] = [
                int(name) if name in numbers else column_index(names, name, row.named_at, f"{key}.{role}", row.csv)
                for name in asked
            ]
    _reject_targets_as_inputs(row, types, found, key)
    by_number = all(name.strip().isdecimal() for role in found for name in columns.names(role))
    if advice and by_number and not looks_like_header(row.names):
        warn_once(f"{row.named_at}: column names that look like data: {listed(row.names)}{advice}")
    for role, indices in found.items():
        yield role, indices if isinstance(getattr(columns, role), tuple) else indices[0]


def _reject_targets_as_inputs(
    row: Row, types: Mapping[str, CellType], found: Mapping[str, list[int]], key: str
) -> None:
    """Raise UserError if a target and an input are the same column: the model would see its targets."""
    for target, role in product(found, found):
        shared = set(found[target]) & set(found[role])
        if types[target].target and not types[role].target and shared:
            raise UserError(
                f"{row.named_at}: {key}.{target} and {key}.{role} are the same column, '{row.names[min(shared)]}'"
            )


def _read_cell(row: Row, cell_type: CellType, found: int | list[int]) -> Any:
    """Return the value of a cell, or of several."""
    cell = row.cells[found] if isinstance(found, int) else tuple(row.cells[index] for index in found)
    indices = [found] if isinstance(found, int) else found
    return read_value(cell, cell_type, row.place, ", ".join(row.names[index] for index in indices))


def read_value(cell: object, cell_type: CellType, place: str, column: str) -> Any:
    """Return the value of a cell, or of a tuple of cells. Raises UserError if it holds something else."""
    try:
        value = cell_type.read(cell)
    except ValueError as hint:
        found = list(cell) if isinstance(cell, tuple) else cell
        raise unexpected_cell(place, column, found, cell_type.description, str(hint)) from None
    if not is_unicode(value):
        raise UserError(f"{place}: expected Unicode text in '{column}', found half of a surrogate pair")
    return value
