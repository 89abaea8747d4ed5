"""Multi-label classification: any number of labels, perhaps none, for a text or for a pair of texts."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from experiment.errors import UserError
from finetune.data.columns import FLAGS, LabelsColumn, TextColumn, TextColumns
from finetune.data.records import Record, Table, reject_two_spellings
from finetune.data.task_config import TaskConfig
from finetune.encoding.encoder import Encoder
from finetune.encoding.examples import Batch, Example
from finetune.scores.calibration import Classified, list_probabilities, pad_probabilities, scale
from finetune.scores.metrics import LabelScores, f1_of_counts, scores_of_counts
from finetune.task_kind import Loss, LossOptions, Prediction, Scorer, TaskKind

_THRESHOLD = 0.5
_SEPARATORS = ",，、;；|/ "  # that are written between labels


class MultiLabelColumns(TextColumns):
    """Columns of a multi-label task."""

    labels: LabelsColumn = "labels"
    """Column with the labels: a JSON list, or text with `task.label_separator` between them; empty if there are
    none. Empty labels are left out. Or, with `task.labels`, a list that has 1 or 0 for each of them (multi-hot). Or a
    list of columns with 1 or 0, one for each label: of its name, or in the order of `task.labels`."""

    text: TextColumn = "text"
    """Column with the text."""


class Config(TaskConfig):
    """Any number of labels for a text or for a pair of texts; each label is predicted on its own."""

    kind: Literal["multi_label"] = "multi_label"
    columns: MultiLabelColumns = MultiLabelColumns()
    metric: Literal["micro_f1", "macro_f1", "weighted_f1", "accuracy"] = "micro_f1"

    label_separator: Annotated[str, Field(min_length=1)] = ","
    """Separator between the labels of a row, where they are text."""

    @property
    def known_labels(self) -> tuple[str, ...]:
        """The labels that the config names, in the order of its columns; () if it does not."""
        columns = self.columns.labels
        return columns if isinstance(columns, tuple) and {*columns}.issuperset(self.labels or ()) else self.labels or ()

    def labels_of(self, values: Mapping[str, Any]) -> list[str]:
        found, known = values["labels"], self.known_labels
        if not isinstance(found, list):
            found = [label for part in found.split(self.label_separator) if (label := part.strip())]
        # 0 and 1 may be labels themselves; of three values, two are the same, as in no list of labels.
        is_vector = isinstance(self.columns.labels, tuple) or len(known) > 2 or not {*found} & {*known}
        if len(found) == len(known) and FLAGS.keys() >= {*found} and is_vector:
            return [label for label, value in zip(known, found, strict=True) if FLAGS[value] == "1"]
        return found

    @model_validator(mode="after")
    def _columns_are_labels(self) -> Self:
        columns = self.columns.labels
        if isinstance(columns, tuple) and not 2 <= len(set(columns)) == len(columns) == len(self.labels or columns):
            raise ValueError("columns.labels: expected two or more different columns, as many as in `labels`, if set")
        places = zip(columns, self.known_labels, strict=True) if isinstance(columns, tuple) else ()
        if moved := [column for column, label in places if column != label and column in (self.labels or ())]:
            raise ValueError(f"columns.labels: {moved[0]} has the name of a label, but not its place in `labels`")
        return self


class Kind(TaskKind[Config]):
    """A prediction has `labels`, whose probability is 0.5 or more, and `probabilities`, by label."""

    config_type = Config
    weights_labels = True
    answer = "labels"

    @classmethod
    def find_labels(cls, config: Config, train: Table) -> tuple[str, ...]:
        """Return the labels that the config names, otherwise those of the training split, sorted. Raises UserError if
        one is alone or has two spellings, and if they are multi-hot vectors."""
        if config.known_labels:
            return config.known_labels
        rows = reversed(train.records)
        places = {label: record.place for record in rows for label in config.labels_of(record.values)}
        reject_two_spellings(places)
        if length := _multi_hot_length([config.labels_of(record.values) for record in train.records]):
            raise UserError(
                f"{train.path}: the labels of each row are {length} zeros and ones, a multi-hot vector; list the names "
                f"of the {length} labels, in its order, in task.labels"
            )
        if len(places) < 2:
            found = f"only the label '{min(places)}'" if places else "no labels"
            raise UserError(f"{train.path}: {found}; expected two or more labels")
        return tuple(sorted(places))

    @property
    def head(self) -> dict[str, Any]:
        return {**super().head, "problem_type": "multi_label_classification"}

    @property
    def usage(self) -> str:
        return super().usage.replace("$tokenizing", "top_k=None, $tokenizing")  # the probabilities of all labels

    def describe(self, train: Table) -> list[str]:
        rows = [self.config.labels_of(record.values) for record in train.records]
        counts = Counter(label for labels in rows for label in labels)
        shares, none = self.describe_shares(counts, len(train)), sum(not labels for labels in rows) / len(train)
        return [
            f"{len(self.labels):,} labels, share of the rows in train: {shares}; none {none:.1%}",
            *(
                f"the label '{label}' is other labels with '{separator}' between them: set task.label_separator, or "
                "use one separator in all rows"
                for label, separator in islice(_joined(self.labels), 1)
            ),
        ]

    def check_target(self, record: Record) -> None:
        self._target(record)

    def target(self, record: Record, roles: Sequence[str]) -> object:
        """Return the labels as a set: their order means nothing."""
        return set(self.config.labels_of(record.values))

    def expand(self, record: Record, encoder: Encoder, training: bool) -> list[Example]:
        target = self._target(record) if "labels" in record.values else None
        return [Example((encoder.encode(*TextColumns.texts(record.values)),), target)]

    def _target(self, record: Record) -> list[float]:
        return self._multi_hot(self.config.labels_of(record.values), record.place)

    def _multi_hot(self, labels: Sequence[str], place: str) -> list[float]:
        ids = {self.label_id(label, place) for label in labels}
        return [float(number in ids) for number in range(len(self.labels))]

    def label_weights(self, examples: Sequence[Example]) -> tuple[float, ...]:
        """Return the weight of each label where it is present, then of each where it is absent: N / (2 · count), so
        that all labels have the same share of the loss, half of it where they are present. 1 for a label that is always
        present, or never."""
        present = np.sum([example.target for example in examples], axis=0)
        counts = np.stack([present, len(examples) - present])
        balanced = len(examples) / (2 * np.maximum(counts, 1))
        return tuple(np.where((counts == 0).any(axis=0), 1.0, balanced).flatten().tolist())

    def loss(self, outputs: Tensor, batch: Batch, options: LossOptions) -> Loss:
        """Return the binary cross-entropy, mean over the labels."""
        assert batch.targets is not None
        weights = None
        if options.label_weights is not None:
            present, absent = options.label_weights.chunk(2)
            weights = torch.where(batch.targets > 0, present, absent)
        losses = F.binary_cross_entropy_with_logits(outputs.float(), batch.targets, weights, reduction="none")
        return Loss.of(losses.mean(dim=-1).sum(), len(losses))

    def decode(self, record: Record, examples: Sequence[Example], outputs: Sequence[NDArray[np.float32]]) -> Prediction:
        probabilities = torch.sigmoid(torch.from_numpy(outputs[0]).double()).tolist()
        by_label = dict(zip(self.labels, probabilities, strict=True))
        return {
            "labels": [label for label, probability in by_label.items() if probability >= _THRESHOLD],
            "probabilities": by_label,
        }

    def scorer(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> Scorer:
        """Return F1 of each label's yes or no: over all decisions (micro), or the mean over the labels, equal or
        weighted by frequency; 0 for a label that neither occurs nor is predicted in any of the records. accuracy: rows
        with exactly the right labels."""
        targets, predicted = self._targets(records) > 0, self._predicted(predictions) > 0
        both, exact = targets & predicted, (targets == predicted).all(axis=1)
        known = (targets | predicted).any(axis=0).sum()

        def score(rows: NDArray[np.int64]) -> dict[str, float]:
            correct, support, found = (each[rows].sum(axis=0) for each in (both, targets, predicted))
            f1 = f1_of_counts(correct, support, found)
            # A label that is missing in these rows alone says nothing: without a rare one, a resample is no worse.
            drawn = max((support + found > 0).sum(), 1)
            return {
                "micro_f1": float(f1_of_counts(correct.sum(), support.sum(), found.sum())),
                "macro_f1": float(f1.mean() * (known / drawn)),
                "weighted_f1": float(f1 @ support / max(support.sum(), 1)),
                "accuracy": float(exact[rows].mean()),
            }

        return score

    def losses(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> NDArray[np.float64]:
        """Return the binary cross-entropy, mean over the labels."""
        return np.asarray(self.classified(records, predictions).losses.reshape(len(records), -1).mean(axis=1))

    def classified(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> Classified:
        """Classify each label of each record as no or yes."""
        targets = self._targets(records)
        is_correct = targets == self._predicted(predictions)
        probabilities = _no_and_yes(pad_probabilities(predictions).ravel())
        return Classified(targets.astype(int).ravel(), probabilities, is_correct.ravel())

    def calibrate(self, prediction: Prediction, temperature: float) -> Prediction:
        scaled = scale(_no_and_yes(np.array(list_probabilities(prediction))), temperature)[:, 1].tolist()
        return {**prediction, "probabilities": dict(zip(self.labels, scaled, strict=True))}

    def label_scores(self, records: Sequence[Record], predictions: Sequence[Prediction]) -> LabelScores:
        targets, predicted = self._targets(records).astype(int), self._predicted(predictions).astype(int)
        counts = (each.sum(axis=0) for each in (targets * predicted, targets, predicted))
        return scores_of_counts(self.labels, *counts)

    def _targets(self, records: Sequence[Record]) -> NDArray[np.float64]:
        """Return 1 for each label that a record has, otherwise 0, as NC."""
        return np.array([self._target(record) for record in records])

    def _predicted(self, predictions: Sequence[Prediction]) -> NDArray[np.float64]:
        return np.array([self._multi_hot(prediction["labels"], "") for prediction in predictions])


def _no_and_yes(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([1.0 - probabilities, probabilities], axis=-1)


def _joined(labels: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield labels that consist of others, and the separator between these."""
    known = set(labels)
    for label in labels:
        for separator in _SEPARATORS:
            parts = [part.strip() for part in label.split(separator)]
            if len(parts) > 1 and known.issuperset(parts):
                yield label, separator


def _multi_hot_length(rows: Sequence[Sequence[str]]) -> int | None:
    """Return the length of multi-hot vectors; None if rows are lists of labels: they differ, and have none twice."""
    lengths = {len(row) for row in rows}
    values = {value for row in rows for value in row}
    is_vector = any(len(set(row)) < len(row) for row in rows) or all(values == set(row) for row in rows)
    return lengths.pop() if len(lengths) == 1 and len(values) == 2 and values <= FLAGS.keys() and is_vector else None
