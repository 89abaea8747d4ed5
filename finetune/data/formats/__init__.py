"""The formats of data files. Each gives the rows of a file as named cells."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from experiment.csv_and_jsonl import CsvFormat
from experiment.errors import UserError
from finetune.data.formats.conll import read_conll
from finetune.data.formats.delimited import read_delimited
from finetune.data.formats.json_files import read_json, read_json_folder, read_jsonl
from finetune.data.formats.parquet import read_parquet
from finetune.data.formats.row import Row

FormatName = Literal["csv", "jsonl", "json", "parquet", "conll"]

_FORMATS: dict[str, FormatName] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".jsonl": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".conll": "conll",
}


@dataclass(frozen=True)
class FileFormat:
    """How to read a data file."""

    name: FormatName | None = None  # None: as the file name suggests
    csv: CsvFormat = field(default_factory=CsvFormat)  # if it has no separator, the file name suggests one
    name_key: str = "task.format"  # what messages call the option for the name


def read_rows(path: Path, file_format: FileFormat) -> Iterator[Row]:
    """The rows of a file, perhaps compressed (.gz), or of all .json files of a folder.

    Raises UserError with file and line.
    """
    if path.is_dir():
        return read_json_folder(path)
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    match file_format.name or _FORMATS.get(suffix):
        case "csv":
            separator = file_format.csv.separator or ("," if suffix == ".csv" else "\t")
            return read_delimited(path, replace(file_format.csv, separator=separator))
        case "jsonl":
            return read_jsonl(path)
        case "json":
            return read_json(path)
        case "parquet":
            return read_parquet(path)
        case "conll":
            return read_conll(path)
    raise UserError(
        f"{path}: expected a file that ends in {', '.join(_FORMATS)} (or one of these and .gz); "
        f"for another name, set {file_format.name_key}"
    )
