"""Files of rows, in a format that the name says: .csv, .tsv, .jsonl or .parquet; and predictions, which are such rows.

Cells are written as they are, even if they begin with `=`, `+`, `-` or `@`, which spreadsheets run as formulas: a
file is read again by programs, and escaping formulas would also change texts and negative numbers.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiment.config import load_config
from experiment.errors import UserError, reason, require_damage
from experiment.files import atomic_write, parse_json, read_json
from experiment.models.model_names import local_model
from experiment.run_files.run_folder import RunFolder
from finetune.config import FinetuneConfig
from finetune.data.records import Record, Table
from finetune.data.splits import read_splits
from finetune.encoding.encoder import turn_joiner
from finetune.scores.significance import Score
from finetune.task_kind import Prediction, TaskKind, find_kind

_WAITING = 50_000  # rows of a Parquet file without a value in some column
_DECIMALS = 6  # of probabilities
_WORST = 50  # rows

Rows = Sequence[Mapping[str, Any]]
"""Rows of the same columns. Values are as in JSON; in CSV, lists and mappings become JSON texts, in Parquet too, except
lists of floats."""

Write = Callable[[Rows], None]


def check_row_file(path: Path) -> None:
    """Raise UserError unless the name of a file says a format."""
    if path.suffix not in _FORMATS:
        raise UserError(f"{path}: expected a file that ends in {', '.join(_FORMATS)}")


@contextmanager
def open_row_file(path: Path) -> Iterator[Write]:
    """Yield a function that adds rows to a new file, which appears, or replaces another, if the block succeeds."""
    check_row_file(path)
    with atomic_write(path) as temporary, _FORMATS[path.suffix](temporary) as write:
        yield write


def write_rows(path: Path, rows: Rows) -> None:
    """Write a whole file."""
    with open_row_file(path) as write:
        write(rows)


@contextmanager
def _delimited(path: Path, separator: str) -> Iterator[Write]:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        columns: list[str] = []

        def write(rows: Rows) -> None:
            if not columns and rows:
                columns.extend(rows[0])
                writer.writerow(columns)
            writer.writerows([_cell(row[column]) for column in columns] for row in rows)

        yield write


@contextmanager
def _json_lines(path: Path) -> Iterator[Write]:
    with path.open("w", encoding="utf-8") as file:
        yield lambda rows: file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


@contextmanager
def _parquet(path: Path) -> Iterator[Write]:
    import pyarrow
    from pyarrow import parquet

    arrow = {bool: pyarrow.bool_(), int: pyarrow.int64(), float: pyarrow.float64()}
    floats = pyarrow.list_(pyarrow.float64())
    types: dict[str, Any] = {}  # of the columns that have had a value
    waiting: list[Mapping[str, Any]] = []  # until all columns have a type; the others become texts
    writer: Any = None

    def flush() -> None:
        nonlocal writer
        if writer is None:
            fields = [(column, types.get(column, pyarrow.string())) for column in waiting[0]]
            writer = parquet.ParquetWriter(path, pyarrow.schema(fields))
        texts = {field.name for field in writer.schema if field.type == pyarrow.string()}
        cells = [
            {column: _text(value) if column in texts else value for column, value in row.items()} for row in waiting
        ]
        writer.write_table(pyarrow.Table.from_pylist(cells, schema=writer.schema))
        waiting.clear()

    def write(rows: Rows) -> None:
        waiting.extend(rows)
        for row in rows if writer is None else ():
            for column, value in row.items():
                if column not in types and value not in (None, []):
                    has_floats = isinstance(value, list) and all(isinstance(each, float) for each in value)
                    types[column] = floats if has_floats else arrow.get(type(value), pyarrow.string())
        if waiting and (len(types) == len(waiting[0]) or len(waiting) >= _WAITING):
            flush()

    try:
        yield write
        if waiting:
            flush()
    finally:
        if writer is not None:
            writer.close()


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | tuple | dict) else value


_FORMATS: dict[str, Callable[[Path], AbstractContextManager[Write]]] = {
    ".csv": partial(_delimited, separator=","),
    ".tsv": partial(_delimited, separator="\t"),
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}


class DamagedPredictionsError(UserError):
    """The predictions of a seed are missing, damaged or of other data."""


def read_predictions(path: Path) -> list[Prediction]:
    """Return the predictions in a .jsonl file of them. Raises DamagedPredictionsError."""
    try:
        return [parse_json(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError) as error:
        require_damage(error, f"{path} cannot be read")
        raise DamagedPredictionsError(f"{path} is damaged: {reason(error)}") from None


def optional_inputs(kind: TaskKind[Any], records: Iterable[Record]) -> Set[str]:
    """Return the optional columns that the model reads, such as `negative`, and that any of the records has."""
    types = kind.config.columns.cell_types()
    roles = {role for role, cell_type in types.items() if cell_type.optional and cell_type.encoded}
    return {role for record in records for role in roles & record.values.keys()} if roles else roles


def prediction_rows(
    kind: TaskKind[Any], records: Sequence[Record], predictions: Sequence[Prediction], optional: Set[str] | None = None
) -> list[dict[str, Any]]:
    """Return a row for each record, or several as its kind says: its number in the file or drawn split, the columns of
    the task, `predicted`, and further parts of the prediction, such as `probability_LABEL`.

    optional: of all records of the file, see `optional_inputs`; None: these are all.
    """
    optional = optional_inputs(kind, records) if optional is None else optional
    return [
        {"row": record.row, **dict(_inputs(values, kind, optional)), **dict(_flatten(part, kind))}
        for record, prediction in zip(records, predictions, strict=True)
        for values, part in kind.rows(record, prediction)
    ]


def _inputs(values: Mapping[str, Any], kind: TaskKind[Any], optional: Set[str]) -> Iterator[tuple[str, Any]]:
    """Yield the values of a record: texts first, then the target. optional: columns that are empty if it lacks them."""
    types = kind.config.columns.cell_types()
    if not optional <= values.keys():
        values = {role: values.get(role, []) for role in types if role in values or role in optional} | dict(values)
    for role in sorted(values, key=lambda role: role in types and types[role].target):
        yield role, values[role]


def _flatten(prediction: Prediction, kind: TaskKind[Any]) -> Iterator[tuple[str, Any]]:
    for key, value in prediction.items():
        if key == "probabilities" and set(value) == set(kind.labels):
            yield from ((f"probability_{name}", round(probability, _DECIMALS)) for name, probability in value.items())
        else:
            yield "predicted" if key == kind.answer else key, value


def write_worst_rows(
    path: Path, kind: TaskKind[Any], records: Sequence[Record], predictions: Sequence[Prediction]
) -> None:
    """Write the 50 rows of the predictions with the highest loss, highest first; no file if the kind has no losses."""
    if (losses := kind.losses(records, predictions)) is None:
        return
    rows = prediction_rows(kind, records, predictions)
    order = np.argsort(-losses, kind="stable")[:_WORST].tolist()
    write_rows(path, [{"loss": round(float(losses[index]), 6), **rows[index]} for index in order])


@dataclass(frozen=True)
class ScoredSplit:
    """Records with targets, and the predictions of the model of each seed."""

    kind: TaskKind[Any]
    records: Sequence[Record]
    predictions: Sequence[Sequence[Prediction]]  # by seed

    def scorer(self, metric: str) -> Score:
        """Return the function that computes a metric of drawn records. Seeds are given by position."""
        scorers = [self.kind.scorer(self.records, predictions) for predictions in self.predictions]
        return lambda seed, rows: scorers[seed](rows)[metric]


def read_scored_split(
    folder: RunFolder, split: str, labels: Sequence[str], files: Mapping[str, str], tables: dict[str, Table]
) -> ScoredSplit:
    """Read a split. labels: as in the results of the run. files: split -> where its data are now. tables: of this split
    for other runs, to which the one for this run is added.

    Raises UserError if the data or the predictions have changed or cannot be read, DamagedPredictionsError if the
    latter are damaged.
    """
    config = load_config(FinetuneConfig, folder.config)
    task, model, fit_on = config.task.with_files(files), config.model.init_from, config.training.fit_on
    key = repr((task, fit_on, model if task.dialogue else None))
    if key not in tables:
        tables[key] = read_splits(task, turn_joiner(local_model(model), task), fit_on)[split]
    table, kind = tables[key], find_kind(task.kind)(task, tuple(labels))
    predictions = []
    for seed in config.training.seeds:
        path = folder.seed_folder(seed)
        if _scored_data(path, split) != table.digest:
            raise DamagedPredictionsError(
                f"{table.path} differs from the data that {path} was scored on: it was edited, or another version has "
                "read it"
            )
        file = path / f"predictions-{split}.jsonl"
        if len(found := read_predictions(file)) != len(table):
            problem = f"expected {len(table):,} predictions, found {len(found):,}"
            raise DamagedPredictionsError(f"{file} is damaged: {problem}")
        predictions.append(found)
    return ScoredSplit(kind, table.records, predictions)


def _scored_data(seed_folder: Path, split: str) -> str:
    """Return the checksum of the data that a finished seed was scored on. Raises DamagedPredictionsError."""
    path = seed_folder / "COMPLETE"
    try:
        return str(read_json(path)["settings"]["data"][split])
    except FileNotFoundError:
        raise DamagedPredictionsError(f"{path} does not exist") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        require_damage(error, f"{path} cannot be read")
        raise DamagedPredictionsError(f"{path} is damaged: expected the settings of a finished seed") from None
