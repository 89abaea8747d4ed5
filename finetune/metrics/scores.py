"""Metrics of predictions: pure functions of arrays."""

import statistics
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, matthews_corrcoef

LabelIds = NDArray[np.int64]  # N


def classification_scores(gold: LabelIds, predicted: LabelIds) -> dict[str, float]:
    """All classification metrics, each in [0, 1] except matthews in [-1, 1].

    F1 is averaged over the labels that occur in either array, as scikit-learn does by default; uar, the unweighted
    average recall (balanced accuracy), over those in `gold`. matthews is the correlation coefficient of Matthews
    (1975), extended to more than two labels by Gorodkin (2004); 0 if undefined.
    """
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
