import numpy as np
import pytest

from finetune.metrics.scores import classification_scores, confusion_matrix, summarize


def test_scores_of_a_case_counted_by_hand() -> None:
    """Catches macro and weighted averages mixed up, and recall taken for precision.

    Label 0: 3 gold, 2 found, 3 predicted -> precision 2/3, recall 2/3, F1 2/3. Label 1: 2 gold, 1 found, 1 predicted ->
    1, 1/2, 2/3. Label 2: 1 gold, 1 found, 2 predicted -> 1/2, 1, 2/3 … and 4 of 6 right.
    """
    gold, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 2, 1, 0, 2])
    scores = classification_scores(gold, predicted)
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["macro_f1"] == pytest.approx(2 / 3)
    assert scores["uar"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    # Gorodkin: (c·s − Σ p_k t_k) / sqrt((s² − Σ p_k²)(s² − Σ t_k²)), s = 6 rows, c = 4 right
    products, predictions, golds = 3 * 3 + 1 * 2 + 2 * 1, 3**2 + 1 + 2**2, 3**2 + 2**2 + 1
    assert scores["matthews"] == pytest.approx((4 * 6 - products) / ((36 - predictions) * (36 - golds)) ** 0.5)


def test_weighted_f1_weighs_by_gold_counts() -> None:
    """Catches weighted F1 that is macro F1 (here they differ), or weighs by predictions."""
    gold, predicted = np.array([0, 0, 0, 1]), np.array([0, 0, 0, 0])
    scores = classification_scores(gold, predicted)
    f1_of_0 = 2 * 3 / (3 + 4)
    assert scores["weighted_f1"] == pytest.approx(3 / 4 * f1_of_0)
    assert scores["macro_f1"] == pytest.approx(f1_of_0 / 2)
    assert scores["uar"] == pytest.approx(0.5)
    assert scores["matthews"] == 0.0


def test_a_predicted_label_that_never_occurs_does_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    """Catches scikit-learn's warnings on the user's terminal in ordinary cases of small splits."""
    classification_scores(np.array([0, 0]), np.array([0, 1]))
    classification_scores(np.array([0, 0]), np.array([0, 0]))
    assert not recwarn.list


def test_confusion_has_gold_in_rows() -> None:
    """Catches a transposed matrix, and one that is too small when the last label is missing."""
    assert confusion_matrix(np.array([0, 0, 1]), np.array([1, 0, 1]), 3).tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_summarize_over_seeds() -> None:
    """Catches the population standard deviation, too small for few seeds, and a spread of 0 for a single seed."""
    assert summarize([1.0, 2.0, 6.0]) == {"values": [1.0, 2.0, 6.0], "mean": 3.0, "std": 7.0**0.5, "median": 2.0}
    assert summarize([0.5])["std"] is None
