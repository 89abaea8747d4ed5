"""Classification: one label for a text or for a pair of texts."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from experiment.errors import UserError
from finetune.data.columns import LabelColumn, TextColumns, as_number
from finetune.data.records import Record, Table, reject_two_spellings
from finetune.data.task_config import TaskConfig
from finetune.encoding.encoder import Encoder
from finetune.encoding.examples import Batch, Example
from finetune.scores.calibration import Classified, pad_probabilities
from finetune.scores.metrics import classification_scores
from finetune.task_kind import Loss, LossOptions, Prediction, Scorer, TaskKind


class ClassificationColumns(TextColumns):
    """Columns of a classification task."""

    label: LabelColumn = "label"
    """Column with the label."""


class Config(TaskConfig):
    """One label for a text or for a pair of texts."""

    kind: Literal["classification"] = "classification"
    columns: ClassificationColumns = ClassificationColumns()
    metric: Literal["accuracy", "macro_f1", "weighted_f1", "uar", "matthews"] = "accuracy"


def _reject_numbers(train: Table) -> None:
    """Raise UserError if the labels are numbers and not all of them whole."""
    numbers = [as_number(record.values["label"]) for record in train.records]
    if None in numbers:
        return
    for record, number in zip(train.records, numbers, strict=True):
        if number is not None and not number.is_integer():
            problem = "is a fraction; for regression set task.kind: regression, for classes"
            if not math.isfinite(number):
                problem = "among numbers looks like a missing value; remove such rows, or, if it is a class,"
            raise UserError(f"{record.place}: the label {record.values['label']} {problem} list them in task.labels")


class Kind(TaskKind[Config]):
    """A prediction has `label` and `probabilities`, by label."""

    config_type = Config
    smooths_labels = True
    weights_labels = True

    @classmethod
    def find_labels(cls, config: Config, train: Table) -> tuple[str, ...]:
        """Return the labels of the training split, sorted, as numbers if all of them are.

        Raises UserError if there is only one, if they are numbers and not all whole, or for one with two spellings.
        """
        _reject_numbers(train)
        reject_two_spellings({record.values["label"]: record.place for record in reversed(train.records)})
        labels = {record.values["label"] for record in train.records}
        if len(labels) < 2:
            raise UserError(f"{train.path}: every row has the label '{labels.pop()}'; expected two or more labels")
        in_order = sorted(labels)
        return tuple(sorted(in_order, key=int) if all(label.isdecimal() for label in labels) else in_order)

    @property
    def head(self) -> dict[str, Any]:
        # Otherwise the type of a multi-label encoder would stay, and transformers' pipeline would not apply a softmax.
        return {**super().head, "problem_type": "single_label_classification"}

    def describe(self, train: Table) -> list[str]:
        counts = Counter(record.values["label"] for record in train.records)
        return [f"{len(self.labels):,} labels, in train: {self.describe_shares(counts, len(train))}"]

    def check_target(self, record: Record) -> None:
        self.label_id(record.values["label"], record.place)

    def expand(self, record: Record, encoder: Encoder, training: bool) -> list[Example]:
        target = self.label_id(record.values["label"], record.place) if "label" in record.values else None
        return [Example((encoder.encode(*TextColumns.texts(record.values)),), target)]

    def label_weights(self, examples: Sequence[Example]) -> tuple[float, ...]:
        """Return weights that give each label the same share of the loss."""
        return balanced_weights([example.target for example in examples], len(self.labels))

    def loss(self, outputs: Tensor, batch: Batch, options: LossOptions) -> Loss:
        assert batch.targets is not None
        return Loss.of(weighted_cross_entropy(outputs, batch.targets, options), len(batch.targets))

    def decode(self, record: Record, examples: Sequence[Example], outputs: Sequence[NDArray[np.float32]]) -> Prediction:
        probabilities = torch.softmax(torch.from_numpy(outputs[0]), dim=-1).tolist()
        by_label = dict(zip(self.labels, probabilities, strict=True))
        return {"label": max(by_label, key=by_label.__getitem__), "probabilities": by_label}

    def scorer(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> Scorer:
        targets, predicted = self.label_pairs(records, predictions)
        return lambda rows: classification_scores(targets[rows], predicted[rows])

    def classified(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> Classified:
        targets, predicted = self.label_pairs(records, predictions)
        return Classified(targets, pad_probabilities(predictions), targets == predicted)

    def label_pairs(
        self, records: Sequence[Record], predictions: Sequence[Prediction]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        targets = np.array([self.label_ids[record.values["label"]] for record in records])
        return targets, np.array([self.label_ids[prediction["label"]] for prediction in predictions])


def weighted_cross_entropy(outputs: Tensor, targets: Tensor, options: LossOptions) -> Tensor:
    """Return the sum of cross-entropies, each weighted by its own label. outputs: NC; targets: N, -100 does not count.

    torch's own weights would multiply the smoothed share of every other label by the weight of that label, so that
    frequent labels have rare ones as their target.
    """
    losses = F.cross_entropy(outputs.float(), targets, label_smoothing=options.label_smoothing, reduction="none")
    return (losses if options.label_weights is None else losses * options.label_weights[targets.clamp(min=0)]).sum()


def balanced_weights(targets: Sequence[int], labels: int) -> tuple[float, ...]:
    """Return N / (C · count) for each label, King & Zeng (2001); 0 for a label without targets."""
    counts = np.bincount(targets, minlength=labels)
    share = len(targets) / np.count_nonzero(counts)
    return tuple(float(share / count) if count else 0.0 for count in counts)
