import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from finetune.metrics.label_scores import label_scores, top_confusions

LABELS = ("a", "b", "c", "d")


def test_scores_are_those_of_scikit_learn() -> None:
    """Catches precision and recall mixed up, and a division by zero for a label that is never predicted or never
    occurs."""
    gold, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 3, 0]
    matrix = confusion_matrix(gold, predicted, labels=range(4))
    expected = precision_recall_fscore_support(gold, predicted, labels=range(4), zero_division=0.0)
    found = label_scores(matrix, LABELS)
    for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [found[label][name] for label in LABELS] == pytest.approx(values.tolist())


def test_mistakes_are_ordered_by_count() -> None:
    """Catches right answers among the mistakes, transposed labels, and mistakes that never happened."""
    matrix = np.array([[9, 1, 0, 0], [4, 5, 1, 0], [0, 0, 3, 0], [0, 0, 0, 0]])
    assert top_confusions(matrix, LABELS) == [
        {"label": "b", "predicted": "a", "count": 4, "share": 0.4},
        {"label": "a", "predicted": "b", "count": 1, "share": 0.1},
        {"label": "b", "predicted": "c", "count": 1, "share": 0.1},
    ]
    assert len(top_confusions(matrix, LABELS, count=2)) == 2
