"""`worst-<split>.csv`: the rows that a model gets most wrong, to be read by a person: often the label is wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.records import Record
from finetune.results.predictions import prediction_rows
from finetune.results.row_file import write_rows
from finetune.task_kind import Prediction, TaskKind

_COUNT = 50


def write_worst_rows(
    path: Path, kind: TaskKind[Any], records: Sequence[Record], predictions: Sequence[Prediction]
) -> None:
    """The 50 rows of the predictions file with the highest loss, highest first; no file if the kind has no losses."""
    losses = kind.losses(records, predictions)
    if losses is None:
        return
    rows = prediction_rows(kind, records, predictions)
    order = np.argsort(-losses, kind="stable")[:_COUNT].tolist()
    write_rows(path, [{"loss": round(float(losses[index]), 6), **rows[index]} for index in order])
