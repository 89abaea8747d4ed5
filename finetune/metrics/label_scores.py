"""Scores of each label, and which labels are mistaken for which."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Confusion = NDArray[np.int64]  # CC counts: rows by label, columns by predicted label

LabelScores = Mapping[str, Mapping[str, float]]
"""Label -> precision, recall, f1 and support (how often it occurs)."""


def label_scores(confusion: Confusion, labels: Sequence[str]) -> LabelScores:
    """The scores of labels of which each record has one."""
    return scores_of_counts(labels, np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0))


def scores_of_counts(
    labels: Sequence[str], right: NDArray[np.int64], support: NDArray[np.int64], predicted: NDArray[np.int64]
) -> LabelScores:
    """C counts of each label: how often it is predicted and right, occurs, and is predicted. A score of nothing is 0,
    as in scikit-learn."""
    precision, recall = right / np.maximum(predicted, 1), right / np.maximum(support, 1)
    f1 = 2 * right / np.maximum(support + predicted, 1)
    columns = {"precision": precision, "recall": recall, "f1": f1, "support": support}
    return {label: {name: values[at].item() for name, values in columns.items()} for at, label in enumerate(labels)}


def top_confusions(confusion: Confusion, labels: Sequence[str], count: int = 10) -> list[dict[str, Any]]:
    """The most frequent mistakes, as {label, predicted, count, share}. share: of the label's records."""
    mistakes = confusion - np.diag(np.diag(confusion))
    order = np.argsort(-mistakes, axis=None, kind="stable")[:count]
    places = [divmod(int(place), len(labels)) for place in order]
    return [
        {
            "label": labels[row],
            "predicted": labels[column],
            "count": int(mistakes[row, column]),
            "share": float(mistakes[row, column] / confusion[row].sum()),
        }
        for row, column in places
        if mistakes[row, column]
    ]
