"""The rows that predictions are written as, in the files of a run and by `deepcloze predict`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment.errors import UserError, reason
from experiment.files import write_text
from experiment.strict_json import parse_json
from finetune.data.records import Record, Table
from finetune.results.row_file import write_rows
from finetune.task_kind import Prediction, TaskKind

_DECIMALS = 6  # of probabilities


def write_predictions(path: Path, kind: TaskKind[Any], table: Table, predictions: Sequence[Prediction]) -> None:
    """The records of a split, in order."""
    write_rows(path, prediction_rows(kind, table.records, predictions))


def save_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """One JSON object a record, with all digits, for `read_predictions`."""
    write_text(path, "".join(f"{json.dumps(prediction, ensure_ascii=False)}\n" for prediction in predictions))


def read_predictions(path: Path) -> list[Prediction]:
    """What `save_predictions` has written. Raises UserError for a missing or damaged file."""
    try:
        return [parse_json(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None


def prediction_rows(
    kind: TaskKind[Any], records: Sequence[Record], predictions: Sequence[Prediction], first: int = 1
) -> list[dict[str, Any]]:
    """A row for each record, or several as its kind says: its number from `first`, the columns of the task,
    `predicted`, and further parts of the prediction, such as `probability_LABEL`."""
    return [
        {"row": number, **dict(_inputs(values, kind)), **dict(_flatten(part, kind))}
        for number, (record, prediction) in enumerate(zip(records, predictions, strict=True), start=first)
        for values, part in kind.rows(record, prediction)
    ]


def _inputs(values: Mapping[str, Any], kind: TaskKind[Any]) -> Iterator[tuple[str, Any]]:
    """The values of a record: its texts first, then its target."""
    types = kind.config.columns.cell_types()
    for role in sorted(values, key=lambda role: role in types and types[role].target):
        yield role, values[role]


def _flatten(prediction: Prediction, kind: TaskKind[Any]) -> Iterator[tuple[str, Any]]:
    for key, value in prediction.items():
        if key == "probabilities" and set(value) == set(kind.labels):
            yield from ((f"probability_{name}", round(probability, _DECIMALS)) for name, probability in value.items())
        else:
            yield "predicted" if key == kind.answer else key, value
