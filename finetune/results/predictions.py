"""Files of predictions: the rows that they hold, the worst of them, and predictions read back to be scored again."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiment.config import load_config
from experiment.errors import UserError, reason
from experiment.files import write_text
from experiment.run_folder import RunFolder
from experiment.strict_json import parse_json
from finetune.config import FinetuneConfig
from finetune.data.records import Record
from finetune.results.row_file import write_rows
from finetune.splits import read_splits
from finetune.task_kind import Prediction, TaskKind, find_kind

_DECIMALS = 6  # of probabilities

_COUNT = 50


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


@dataclass(frozen=True)
class ScoredSplit:
    """Records with targets, and what the model of each seed predicts for them."""

    kind: TaskKind[Any]
    records: Sequence[Record]
    predictions: Sequence[Sequence[Prediction]]  # by seed

    def score(self, metric: str, seed: int, rows: Sequence[int]) -> float:
        """A metric of the records `rows`, in which one may occur several times. seed: its position."""
        predictions = self.predictions[seed]
        return self.kind.scores([self.records[row] for row in rows], [predictions[row] for row in rows])[metric]


def read_scored_split(folder: RunFolder, split: str, labels: Sequence[str]) -> ScoredSplit:
    """labels: as in the results of the run. Raises UserError if the data or the predictions are not as they were."""
    config = load_config(FinetuneConfig, folder.config)
    table = read_splits(config.task, Path(config.model.init_from), config.training.fit_on)[split]
    kind = find_kind(config.task.kind)(config.task, tuple(labels))
    paths = [folder.path / f"seed-{seed}" / f"predictions-{split}.jsonl" for seed in config.training.seeds]
    predictions = [read_predictions(path) for path in paths]
    for path, found in zip(paths, predictions, strict=True):
        if len(found) != len(table):
            raise UserError(f"{path} has {len(found):,} predictions, {table.path} now has {len(table):,} rows")
    return ScoredSplit(kind, table.records, predictions)
