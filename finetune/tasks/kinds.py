"""The table of task kinds: what reading, training and scoring need to know about each, not how they do it."""

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
from finetune.tasks.rows import Row, Table

# Shape suffixes: N examples of a split, B examples of a batch, C labels.


@dataclass(frozen=True)
class TaskKind:
    """One kind of task. `target` gives a row's gold value as the loss and the scores want it."""

    auto_model: str  # the class of transformers that puts the right head on an encoder
    find_labels: Callable[[Table], tuple[str, ...]]
    texts: Callable[[Row], tuple[str, ...]]  # what the tokenizer joins into one sequence
    target: Callable[[Table, Row, Sequence[str]], int]
    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # logits_BC, targets_B, weights_C -> mean over B
    probabilities: Callable[[Tensor], Tensor]  # logits_BC -> BC
    scores: Callable[[NDArray[np.int64], NDArray[np.float32]], dict[str, float]]  # targets_N, probabilities_NC


def _distinct_labels(train: Table) -> tuple[str, ...]:
    """The labels of the training rows, sorted: as numbers where all are."""
    labels = {row.values["label"] for row in train.rows}
    if len(labels) < 2:
        raise UserError(f"{train.path}: every row has the label '{labels.pop()}': nothing to tell apart")
    return tuple(sorted(labels, key=int) if all(label.isdecimal() for label in labels) else sorted(labels))


def _one_or_two_texts(row: Row) -> tuple[str, ...]:
    return tuple(row.values[role] for role in ("text", "text_pair") if role in row.values)


def _label_id(table: Table, row: Row, labels: Sequence[str]) -> int:
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
    """A weight per label so that each label has the same share of the loss: N / (C · count), King & Zeng (2001).

    A label that no example has weighs nothing.
    """
    counts = Counter(targets)
    present = len(counts)
    return [len(targets) / (present * counts[label]) if counts[label] else 0.0 for label in range(label_count)]
