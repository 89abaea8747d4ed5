"""The predictions of a finished run for one split, read back to be scored again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment.config import load_config
from experiment.errors import UserError
from experiment.run_folder import RunFolder
from finetune.config import FinetuneConfig
from finetune.data.records import Record
from finetune.results.predictions import read_predictions
from finetune.splits import read_splits
from finetune.task_kind import Prediction, TaskKind, find_kind


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
