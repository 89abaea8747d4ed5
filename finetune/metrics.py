"""Scores of predictions against gold labels: pure functions of two arrays."""

import statistics
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, matthews_corrcoef

Ids = NDArray[np.int64]


def classification_scores(gold: Ids, predicted: Ids) -> dict[str, float]:
    """Every classification metric of N label ids against N gold ones, each in [0, 1] but Matthews' in [-1, 1].

    F1 averages over the labels that occur in either array, as scikit-learn does by default; uar, the unweighted average
    recall (or balanced accuracy), over those that occur in `gold`. matthews is the correlation coefficient of Matthews
    (1975), for more than two labels as Gorodkin (2004) extends it; 0 where it is undefined.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*not in y_true.*"
        )  # a label predicted that gold never has: no matter
        warnings.filterwarnings("ignore", message=".*single label.*")
        return {
            "accuracy": float(accuracy_score(gold, predicted)),
            "macro_f1": float(f1_score(gold, predicted, average="macro", zero_division=0.0)),
            "weighted_f1": float(f1_score(gold, predicted, average="weighted", zero_division=0.0)),
            "uar": float(balanced_accuracy_score(gold, predicted)),
            "matthews": float(matthews_corrcoef(gold, predicted)),
        }


def confusion_matrix(gold: Ids, predicted: Ids, label_count: int) -> Ids:
    """CC counts: rows by gold label, columns by predicted label."""
    return np.bincount(gold * label_count + predicted, minlength=label_count**2).reshape(label_count, label_count)


def spread(values: Sequence[float]) -> dict[str, list[float] | float]:
    """One metric over the seeds: values, mean, sample standard deviation (0 for a single seed) and median."""
    return {
        "values": list(values),
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "median": statistics.median(values),
    }
