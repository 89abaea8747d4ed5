"""Metrics of predictions, scores of each label, and whether a model has collapsed: pure functions of arrays."""

import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LabelIds = NDArray[np.int64]  # N

Confusion = NDArray[np.int64]  # CC counts: rows by label, columns by predicted label

LabelScores = Mapping[str, Mapping[str, float]]
"""Label -> precision, recall, f1 and support (how often it occurs)."""

_CONSTANT = 0.01  # numbers whose spread is below this share of the targets' are constant


def classification_scores(gold: LabelIds, predicted: LabelIds) -> dict[str, float]:
    """All classification metrics, each in [0, 1] except matthews in [-1, 1].

    F1 is averaged over the labels that occur in either array, as scikit-learn does by default; uar, the unweighted
    average recall (balanced accuracy), over those in `gold`. matthews is the correlation coefficient of Matthews
    (1975), extended to more than two labels by Gorodkin (2004); 0 if undefined.
    """
    # Imported here: it takes a second, and every kind of task imports this module.
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, matthews_corrcoef

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not in y_true.*")  # a predicted label that never occurs
        warnings.filterwarnings("ignore", message=".*single label.*")
        return {
            "accuracy": float(accuracy_score(gold, predicted)),
            "macro_f1": float(f1_score(gold, predicted, average="macro", zero_division=0.0)),
            "weighted_f1": float(f1_score(gold, predicted, average="weighted", zero_division=0.0)),
            "uar": float(balanced_accuracy_score(gold, predicted)),
            "matthews": float(matthews_corrcoef(gold, predicted)),
        }


def confusion_matrix(gold: LabelIds, predicted: LabelIds, label_count: int) -> NDArray[np.int64]:
    """CC counts: rows by gold label, columns by predicted label."""
    return np.bincount(gold * label_count + predicted, minlength=label_count**2).reshape(label_count, label_count)


def summarize(values: Sequence[float]) -> dict[str, list[float] | float | None]:
    """A metric over the seeds: values, mean, sample standard deviation (None for a single seed) and median."""
    return {
        "values": list(values),
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "median": statistics.median(values),
    }


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


def is_constant(answers: Sequence[Any], targets: Sequence[Any]) -> bool:
    """Whether all answers are the same although the targets differ. For numbers: whether their spread is near zero."""
    if all(isinstance(value, float) for value in (*answers, *targets)):
        return bool(statistics.pstdev(answers) < _CONSTANT * statistics.pstdev(targets))
    return all(answer == answers[0] for answer in answers) and any(target != targets[0] for target in targets)
