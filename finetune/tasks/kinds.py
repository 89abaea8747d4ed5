"""Kinds of tasks: what reading, training and scoring need to know about each."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from experiment.errors import UserError
from finetune.metrics import classification_scores
from finetune.tasks.rows import Row, TaskTable

# Shape suffixes: N examples of a split, B examples of a batch, C labels.


@dataclass(frozen=True)
class TaskKind:
    """One kind of task."""

    auto_model: str  # transformers class with the head for it
    find_labels: Callable[[TaskTable], tuple[str, ...]]
    texts: Callable[[Row], tuple[str, ...]]  # to be joined into one sequence
    target: Callable[[TaskTable, Row, Sequence[str]], int]  # label id of a row
    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # logits_BC, targets_B, weights_C -> mean over B
    probabilities: Callable[[Tensor], Tensor]  # logits_BC -> BC
    scores: Callable[[NDArray[np.int64], NDArray[np.float32]], dict[str, float]]  # targets_N, probabilities_NC


def _distinct_labels(train: TaskTable) -> tuple[str, ...]:
    """The labels of the training rows, sorted, as numbers if all of them are."""
    labels = {row.values["label"] for row in train.rows}
    if len(labels) < 2:
        raise UserError(f"{train.path}: every row has the label '{labels.pop()}'; expected two or more labels")
    in_order = sorted(labels)
    return tuple(sorted(in_order, key=int) if all(label.isdecimal() for label in labels) else in_order)


def _one_or_two_texts(row: Row) -> tuple[str, ...]:
    return tuple(row.values[role] for role in ("text", "text_pair") if role in row.values)


def _label_id(table: TaskTable, row: Row, labels: Sequence[str]) -> int:
    label = row.values["label"]
    if label not in labels:
        raise UserError(f"{table.path}:{row.line}: unknown label '{label}'; known: {', '.join(labels)}")
    return labels.index(label)


def _cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    return F.cross_entropy(logits.float(), targets, weight=weights)


def _softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits.float(), dim=-1)


def _classification_scores(targets: NDArray[np.int64], probabilities: NDArray[np.float32]) -> dict[str, float]:
    return classification_scores(targets, probabilities.argmax(axis=1))


KINDS: dict[str, TaskKind] = {
    "classification": TaskKind(
        auto_model="AutoModelForSequenceClassification",
        find_labels=_distinct_labels,
        texts=_one_or_two_texts,
        target=_label_id,
        loss=_cross_entropy,
        probabilities=_softmax,
        scores=_classification_scores,
    ),
}


def balanced_weights(targets: Sequence[int], label_count: int) -> list[float]:
    """Weights that give each label the same share of the loss: N / (C · count), King & Zeng (2001).

    A label without examples has weight 0.
    """
    counts = Counter(targets)
    present = len(counts)
    return [len(targets) / (present * counts[label]) if counts[label] else 0.0 for label in range(label_count)]
