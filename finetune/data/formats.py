"""The formats of data files: CSV, JSON, Parquet and CoNLL-2003. Each gives the rows of a file as named cells."""

import gzip
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

import pyarrow

from experiment.csv_and_jsonl import CsvFormat, CsvRow, raw_lines, read_csv, read_json_lines
from experiment.errors import UserError, reason, warn_once
from experiment.files import parse_json, text_lines
from experiment.formatting import counted
from experiment.hub_data import PREFIX, HubData, load_rows, read_cells
from experiment.parquet import open_parquet, parquet_rows

FormatName = Literal["csv", "jsonl", "json", "parquet", "conll"]

FORMATS: dict[str, FormatName] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".jsonl": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".conll": "conll",
}

_SPREADSHEETS = (".xlsx", ".xls", ".ods")

_EXPECTED = "expected a list of objects, one object, one object per line, or the lists of DREAM or SQuAD"

_SPACES = re.compile(" +")


class Row(NamedTuple):
    """One row: cells with names."""

    place: str  # file and line, for messages
    names: Sequence[str]  # of its cells
    cells: Sequence[object]
    named_at: str  # where the names are, such as the header
    csv: CsvFormat | None = None  # of a CSV file, whose columns may also be called by their numbers from 0
    skipped: int = 0  # rows before it, see `task.on_bad_lines`


@contextmanager
def open_lines(path: Path) -> Iterator[Iterator[str]]:
    """The lines of a file, perhaps compressed (.gz). They end at "\\n", "\\r\\n" or "\\r". Raises UserError."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            parts = raw_lines(cast(IO[bytes], file), str(path))
            yield text_lines((line for part in parts for line in part.splitlines(keepends=True)), str(path))
    except (OSError, EOFError, zlib.error) as error:  # also a .gz file that is damaged or not compressed
        raise UserError(f"cannot read {path}: {reason(error)}") from None


@dataclass(frozen=True)
class FileFormat:
    name: FormatName | None = None  # None: as the file name suggests
    csv: CsvFormat = field(default_factory=CsvFormat)  # if it has no separator, the file name suggests one


def read_rows(path: Path, file_format: FileFormat) -> Iterator[Row]:
    """Return the rows of a file, perhaps compressed (.gz), of all .json files of a folder, or of a data set of the Hub.

    Raises UserError with file and line.
    """
    if str(path).startswith(PREFIX):
        return read_hub(HubData.parse(str(path)).pinned())
    if path.is_dir():
        return read_json_folder(path)
    match _format_name(path, file_format):
        case "csv":
            return read_delimited(path, replace(file_format.csv, separator=separator(path, file_format)))
        case "jsonl":
            return read_jsonl(path)
        case "json":
            return read_json(path)
        case "parquet":
            return read_parquet(path)
        case "conll":
            return read_conll(path)
    option = file_format.csv.option("format", "csv")
    advice = f"for another name, set the format, as {option}; {conll_advice(file_format.csv)}"
    if suffix(path) in _SPREADSHEETS:
        advice = "export a spreadsheet as CSV"
    raise UserError(f"{path}: expected a file that ends in {', '.join(FORMATS)} (or one of these and .gz); {advice}")


def conll_advice(csv_format: CsvFormat) -> str:
    return f"for a word and its tags per line, set {csv_format.option('format', 'conll')}"


def separator(path: Path, file_format: FileFormat) -> str | None:
    """Return the column separator of a CSV file; None for a file of another format."""
    if _format_name(path, file_format) != "csv":
        return None
    return file_format.csv.separator or ("," if suffix(path) == ".csv" else "\t")


def _format_name(path: Path, file_format: FileFormat) -> FormatName | None:
    return file_format.name or FORMATS.get(suffix(path))


def suffix(path: Path) -> str:
    name = Path(path.name.lower())  # Windows has names such as Train.CSV
    return name.with_suffix("").suffix if name.suffix == ".gz" else name.suffix


def read_hub(data: HubData) -> Iterator[Row]:
    """Yield the rows of a data set of the Hub. Labels have their names."""
    rows = load_rows(data)
    names = rows.column_names
    for number, cells in enumerate(read_cells(rows, names), start=1):
        yield Row(f"{data}:{number}", names, cells, str(data))


def read_delimited(path: Path, csv_format: CsvFormat) -> Iterator[Row]:
    """Yield the rows of a CSV file.

    If a quoted field seems to hold further rows, rejects it if the separator is a tab; otherwise warns, since texts
    have commas.
    """
    warned = False
    with open_lines(path) as lines:
        names, rows = read_csv(lines, str(path), csv_format)
        for row in rows:
            if not warned and (message := _swallowed_rows(row, csv_format)):
                if csv_format.separator == "\t":
                    raise UserError(f"{path}:{row.line}: {message}")
                warned = True
                warn_once(f"{path}:{row.line}: {message}")
            yield Row(f"{path}:{row.line}", names, row.cells, f"{path}:1", csv_format, row.skipped)


def _swallowed_rows(row: CsvRow, csv_format: CsvFormat) -> str | None:
    """Return a message if a field has line breaks, followed by text that looks like rows."""
    for cell in row.cells:
        if "\n" in cell or "\r" in cell:
            separators = [line.count(csv_format.separator or ",") for line in cell.splitlines()[1:]]
            expected = 1 if csv_format.separator == "\t" else len(row.cells) - 1
            if expected and any(count >= expected for count in separators):
                return (
                    f"a quoted field spans {len(separators) + 1} lines that look like rows: is its quote an ordinary "
                    f"character? Then set {csv_format.option('quoting', '3')}"
                )
    return None


def read_jsonl(path: Path) -> Iterator[Row]:
    """Yield the rows of a file with one object per line."""
    with open_lines(path) as lines:
        for line, cells in read_json_lines(lines, str(path)):
            yield _row(f"{path}:{line}", cells)


def read_json_folder(folder: Path) -> Iterator[Row]:
    """Yield the rows of all .json files in a folder and below it, by file name, as CLOTH (Xie et al. 2018) comes.
    Hidden files are skipped."""
    visible = visible_files(folder)
    files = [path for path in visible if path.suffix == ".json"]
    if not files:
        is_hub = any(path.suffix == ".parquet" for path in visible)
        hint = f"; name a split of its Parquet files as {PREFIX}{folder}:SPLIT" if is_hub else ""
        raise UserError(f"{folder}: a folder without .json files{hint}")
    for path in files:
        yield from read_json(path)


def visible_files(folder: Path) -> list[Path]:
    """Return the files in a folder and below it, by name, without hidden ones and those that macOS adds to archives."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part[0] == "." or part == "__MACOSX" for part in path.relative_to(folder).parts)
    )


def read_json(path: Path) -> Iterator[Row]:
    """Yield the rows of a .json file: its objects, or its questions if they are nested.

    DREAM (Sun et al. 2019) and C3 (Sun et al. 2020) give `context` (the lines of the dialogue, joined by line breaks),
    `question`, `choices`, `answer` and `id`; SQuAD (Rajpurkar et al. 2016) `title`, `context`, `question`, `answers`
    (`text` and `answer_start`, a list each; None in a test split that lacks them) and `id`.
    """
    with open_lines(path) as file:
        lines = list(file)
    try:
        document = parse_json("".join(lines))
    except ValueError as error:
        if len(lines) > 1 and _is_object(lines[0]):
            yield from read_jsonl(path)
            return
        raise UserError(f"{path}: invalid JSON: {error}") from None
    if isinstance(document, dict) and "data" not in document:
        yield _row(str(path), document)
        return
    for number, cells in enumerate(_objects(path, document), 1):
        yield _row(f"{path}, row {number}", cells)


def _row(place: str, cells: Mapping[str, object]) -> Row:
    return Row(place, list(cells), list(cells.values()), place)


def _is_object(line: str) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _objects(path: Path, document: Any) -> Iterator[Mapping[str, object]]:
    items = document["data"] if isinstance(document, dict) else document
    if not isinstance(items, list):
        raise UserError(f"{path}: {_EXPECTED}, found {str(items)[:60]}")
    for number, item in enumerate(items, 1):
        try:
            match item:
                case {"paragraphs": paragraphs}:
                    yield from _squad_questions(item.get("title"), paragraphs)
                case dict():
                    yield item
                case [[*_] as lines, [*questions], identity]:
                    yield from _dream_questions(lines, questions, identity)
                case _:
                    raise TypeError
        except (KeyError, TypeError):
            raise UserError(f"{path}, item {number}: {_EXPECTED}, found {str(item)[:60]}") from None


def _dream_questions(lines: list[str], questions: list[Any], identity: object) -> Iterator[dict[str, object]]:
    for question in questions:
        yield {
            "context": "\n".join(lines),
            "question": question["question"],
            "choices": question["choice"],
            "answer": question.get("answer"),
            "id": identity,
        }


def _squad_questions(title: object, paragraphs: list[Any]) -> Iterator[dict[str, object]]:
    for paragraph in paragraphs:
        for question in paragraph["qas"]:
            if (answers := question.get("answers")) is not None:
                answers = {key: [answer[key] for answer in answers] for key in ("text", "answer_start")}
            yield {
                "title": title,
                "context": paragraph["context"],
                "question": question["question"],
                "answers": answers,
                "id": question.get("id"),
            }


def read_parquet(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file."""
    try:
        with path.open("rb") as stream, open_parquet(stream) as file:
            names = file.schema_arrow.names
            for number, cells in parquet_rows(file, lambda row: f"{path}, row {row}"):
                yield Row(f"{path}, row {number}", names, cells, str(path))
    except (OSError, pyarrow.ArrowException) as error:
        hint = f"; name a split of several files as {PREFIX}{path.parent}:SPLIT" if "*" in path.name else ""
        raise UserError(f"cannot read {path}: {reason(error)}{hint}") from None


def read_conll(path: Path) -> Iterator[Row]:
    """Yield the sentences of a file. The cells of each are lists with an item for each token.

    They are named by the number of their column, from 0; the first is also called `tokens`, the last `tags`. Fields are
    separated by tabs or, in lines without any, by spaces. Document borders (-DOCSTART-) are skipped.
    """
    width: int | None = None
    with open_lines(path) as lines:
        # Before a tab, a space is a token, as in files with a line for each character.
        ends = ((number, line.rstrip("\r\n \t")) for number, line in enumerate(lines, 1))
        numbered = ((number, line.lstrip("\t" if "\t" in line else " ")) for number, line in ends)
        for is_blank, group in groupby(numbered, lambda pair: not pair[1] or pair[1].startswith("-DOCSTART-")):
            if is_blank:
                continue
            sentence = [(number, line.split("\t") if "\t" in line else _SPACES.split(line)) for number, line in group]
            width = width or len(sentence[0][1])
            for number, fields in sentence:
                if len(fields) != width:
                    raise UserError(f"{path}:{number}: expected {counted(width, 'column')}, found {len(fields)}")
            columns = [list(column) for column in zip(*(fields for _, fields in sentence), strict=True)]
            cells = {str(number): column for number, column in enumerate(columns)}
            cells |= {"tokens": columns[0], **({"tags": columns[-1]} if width > 1 else {})}
            yield _row(f"{path}:{sentence[0][0]}", cells)
