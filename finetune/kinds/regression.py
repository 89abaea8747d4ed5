"""Regression: a number for a text or for a pair of texts."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from finetune.data.columns import NumberColumn, TextColumns
from finetune.data.records import Record, Table
from finetune.data.task_config import TaskConfig
from finetune.encoding.encoder import Encoder
from finetune.encoding.examples import Batch, Example
from finetune.scores.metrics import correlation
from finetune.task_kind import Loss, LossOptions, Prediction, Scorer, TaskKind


class RegressionColumns(TextColumns):
    """Columns of a regression task."""

    label: NumberColumn = "label"
    """Column with the number."""


class Config(TaskConfig):
    """A number for a text or for a pair of texts, with mean squared error as loss."""

    has_labels = False

    kind: Literal["regression"] = "regression"
    columns: RegressionColumns = RegressionColumns()
    metric: Literal["pearson", "spearman", "rmse", "mae"] = "pearson"


class Kind(TaskKind[Config]):
    """A prediction has `value`."""

    config_type = Config
    lower_is_better = ("rmse", "mae")
    answer = "value"

    @property
    def head(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def describe(self, train: Table) -> list[str]:
        values = [record.values["label"] for record in train.records]
        return [f"numbers in train: {min(values):g} to {max(values):g}, mean {np.mean(values):.3g}"]

    def target_range(self, train: Table) -> tuple[float, float]:
        values = [record.values["label"] for record in train.records]
        return float(np.mean(values)), float(np.std(values))

    def expand(self, record: Record, encoder: Encoder, training: bool) -> list[Example]:
        return [Example((encoder.encode(*TextColumns.texts(record.values)),), record.values.get("label"))]

    def loss(self, outputs: Tensor, batch: Batch, options: LossOptions) -> Loss:
        assert batch.targets is not None
        losses = F.mse_loss(outputs.float()[:, 0], batch.targets, reduction="none")
        return Loss.of(losses.sum(), len(losses))

    def decode(self, record: Record, examples: Sequence[Example], outputs: Sequence[NDArray[np.float32]]) -> Prediction:
        return {"value": float(outputs[0][0])}

    def scorer(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> Scorer:
        targets = np.array([record.values["label"] for record in records])
        predicted = np.array([prediction["value"] for prediction in predictions])
        errors = np.abs(predicted - targets)
        return lambda rows: {
            "pearson": correlation("pearson", targets[rows], predicted[rows]),
            "spearman": correlation("spearman", targets[rows], predicted[rows]),
            "rmse": float(np.sqrt(np.mean(errors[rows] ** 2))),
            "mae": float(errors[rows].mean()),
        }

    def losses(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> NDArray[np.float64]:
        pairs = zip(records, predictions, strict=True)
        return np.array([(record.values["label"] - prediction["value"]) ** 2 for record, prediction in pairs])
