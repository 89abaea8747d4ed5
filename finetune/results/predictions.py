"""The predictions file: a CSV with a row for each record."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.data.records import Table
from finetune.task_kind import Prediction, TaskKind


def write_predictions(path: Path, kind: TaskKind[Any], table: Table, predictions: Sequence[Prediction]) -> None:
    """The records of a split, in order: row (from 1), the columns of the task, `predicted`, further parts of the
    prediction such as `probability_LABEL`."""
    rows = [
        {"row": number, **dict(_inputs(record.values, kind)), **dict(_flatten(prediction, kind))}
        for number, (record, prediction) in enumerate(zip(table.records, predictions, strict=True), start=1)
    ]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _inputs(values: Any, kind: TaskKind[Any]) -> Iterator[tuple[str, Any]]:
    """The values of a record: its texts first, then its target."""
    types = kind.config.columns.cell_types()
    for role in sorted(values, key=lambda role: types[role].target):
        yield role, _cell(values[role])


def _flatten(prediction: Prediction, kind: TaskKind[Any]) -> Iterator[tuple[str, Any]]:
    for key, value in prediction.items():
        if key == "probabilities":
            yield from ((f"probability_{name}", f"{probability:.6f}") for name, probability in value.items())
        else:
            yield "predicted" if key == kind.answer else key, _cell(value)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
