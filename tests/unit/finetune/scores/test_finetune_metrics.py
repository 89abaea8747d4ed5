import warnings
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from finetune.data.records import Record
from finetune.kinds.classification import Config, Kind
from finetune.scores.metrics import (
    classification_scores,
    confusion_matrix,
    is_constant,
    label_scores,
    summarize,
    top_confusions,
)

LABELS = ("a", "b", "c", "d")


def test_scores_of_a_case_counted_by_hand() -> None:
    """Catches macro and weighted averages mixed up, and recall taken for precision.

    Label 0: 3 targets, 2 found, 3 predicted -> precision 2/3, recall 2/3, F1 2/3. Label 1: 2 targets, 1 found, 1
    predicted -> 1, 1/2, 2/3. Label 2: 1 target, 1 found, 2 predicted -> 1/2, 1, 2/3 … and 4 of 6 right.
    """
    targets, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 2, 1, 0, 2])
    scores = classification_scores(targets, predicted)
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["macro_f1"] == pytest.approx(2 / 3)
    assert scores["uar"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    # Gorodkin: (c·s − Σ p_k t_k) / sqrt((s² − Σ p_k²)(s² − Σ t_k²)), s = 6 rows, c = 4 right
    products, predictions, golds = 3 * 3 + 1 * 2 + 2 * 1, 3**2 + 1 + 2**2, 3**2 + 2**2 + 1
    assert scores["matthews"] == pytest.approx((4 * 6 - products) / ((36 - predictions) * (36 - golds)) ** 0.5)


def test_weighted_f1_weighs_by_gold_counts() -> None:
    """Catches weighted F1 that is macro F1 (here they differ), or weighs by predictions."""
    targets, predicted = np.array([0, 0, 0, 1]), np.array([0, 0, 0, 0])
    scores = classification_scores(targets, predicted)
    f1_of_0 = 2 * 3 / (3 + 4)
    assert scores["weighted_f1"] == pytest.approx(3 / 4 * f1_of_0)
    assert scores["macro_f1"] == pytest.approx(f1_of_0 / 2)
    assert scores["uar"] == pytest.approx(0.5)
    assert scores["matthews"] == 0.0


def test_a_predicted_label_that_never_occurs_does_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    """Catches warnings on the user's terminal in ordinary cases of small splits."""
    classification_scores(np.array([0, 0]), np.array([0, 1]))
    classification_scores(np.array([0, 0]), np.array([0, 0]))
    assert not recwarn.list


@pytest.mark.parametrize("golds", [1, 2, 5, 7])
@pytest.mark.parametrize("predictions", [1, 2, 5, 7])
def test_metrics_are_those_of_scikit_learn(golds: int, predictions: int) -> None:
    """Catches averages over labels that do not occur, or that are never predicted; and an undefined correlation."""
    from sklearn import metrics

    draw = np.random.default_rng(golds)
    targets, predicted = draw.choice(7, golds, replace=False), draw.choice(7, predictions, replace=False)
    targets, predicted = draw.choice(targets, 50), draw.choice(predicted, 50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        expected = {
            "accuracy": metrics.accuracy_score(targets, predicted),
            "macro_f1": metrics.f1_score(targets, predicted, average="macro", zero_division=0.0),
            "weighted_f1": metrics.f1_score(targets, predicted, average="weighted", zero_division=0.0),
            "uar": metrics.balanced_accuracy_score(targets, predicted),
            "matthews": metrics.matthews_corrcoef(targets, predicted),
        }
    assert classification_scores(targets, predicted) == pytest.approx(expected, rel=1e-12)


def test_confusion_has_gold_in_rows() -> None:
    """Catches a transposed matrix, and one that is too small when the last label is missing."""
    assert confusion_matrix(np.array([0, 0, 1]), np.array([1, 0, 1]), 3).tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_summarize_over_seeds() -> None:
    """Catches the population standard deviation, too small for few seeds, and a spread of 0 for a single seed."""
    assert summarize([1.0, 2.0, 6.0]) == {"values": [1.0, 2.0, 6.0], "mean": 3.0, "std": 7.0**0.5, "median": 2.0}
    assert summarize([0.5])["std"] is None


def test_scores_are_those_of_scikit_learn() -> None:
    """Catches precision and recall mixed up, and a division by zero for a label that is never predicted or never
    occurs."""
    from sklearn.metrics import precision_recall_fscore_support

    targets, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 3, 0])
    expected = precision_recall_fscore_support(targets, predicted, labels=range(4), zero_division=0.0)
    found = label_scores(targets, predicted, LABELS)
    for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [found[label][name] for label in LABELS] == pytest.approx(values.tolist())


def test_mistakes_are_in_the_order_of_the_matrix() -> None:
    """Catches pairs that are transposed, and mistakes in another order than that of the matrix."""
    from sklearn import metrics

    targets, predicted = np.random.default_rng(0).integers(0, 4, size=(2, 200))
    matrix = confusion_matrix(targets, predicted, 4)
    assert np.array_equal(matrix, metrics.confusion_matrix(targets, predicted))
    found = mistakes(matrix, count=99)
    assert found == top_confusions(*np.unique(4 * targets + predicted, return_counts=True), LABELS, count=99)
    counts = matrix - np.diag(np.diag(matrix))
    order = [divmod(place, 4) for place in np.argsort(-counts, axis=None, kind="stable")[:12].tolist()]
    assert [(mistake["label"], mistake["predicted"]) for mistake in found] == [(LABELS[a], LABELS[b]) for a, b in order]


def test_mistakes_are_ordered_by_count() -> None:
    """Catches right answers among the mistakes, transposed labels, and mistakes that never happened."""
    matrix = np.array([[9, 1, 0, 0], [4, 5, 1, 0], [0, 0, 3, 0], [0, 0, 0, 0]])
    assert mistakes(matrix) == [
        {"label": "b", "predicted": "a", "count": 4, "share": 0.4},
        {"label": "a", "predicted": "b", "count": 1, "share": 0.1},
        {"label": "b", "predicted": "c", "count": 1, "share": 0.1},
    ]
    assert len(mistakes(matrix, count=2)) == 2


def test_mistakes_of_many_words_need_no_memory() -> None:
    """Catches a matrix that is turned into a pair for each of millions of words."""
    matrix = np.array([[10**12, 0, 0, 0], [0, 1, 0, 10**12], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert [mistake["count"] for mistake in mistakes(matrix)] == [10**12]


def mistakes(matrix: NDArray[np.int64], count: int = 10) -> list[dict[str, Any]]:
    return top_confusions(np.flatnonzero(matrix), matrix[matrix > 0], LABELS, count)


@pytest.mark.parametrize(
    ("answers", "targets", "constant"),
    [
        (["a", "a", "a"], ["a", "b", "a"], True),
        (["a", "b", "a"], ["a", "b", "a"], False),
        (["a", "a", "a"], ["a", "a", "a"], False),
        (["a"], ["a"], False),
        ([2.501, 2.502, 2.5], [0.0, 5.0, 2.0], True),
        ([1.0, 4.0, 2.5], [0.0, 5.0, 2.0], False),
        ([[], [], []], [["x"], [], ["y"]], True),
    ],
)
def test_a_constant_answer_to_different_targets_is_a_collapse(
    answers: list[object], targets: list[object], constant: bool
) -> None:
    """Catches a collapse that is missed, above all of a regression, whose outputs are never exactly equal; and a split
    with a single label, all of it found, that counts as one."""
    assert is_constant(answers, targets) == constant


def test_a_kind_compares_answers_with_targets() -> None:
    """Catches a kind that looks at the texts or the probabilities instead."""
    kind = Kind(Config(train="f.csv", validation="f.csv"), ("a", "b"))
    records = [Record("f.csv:2", {"text": text, "label": label}) for text, label in (("x", "a"), ("y", "b"))]
    predictions = [{"label": "a", "probabilities": {"a": p, "b": 1 - p}} for p in (0.6, 0.9)]
    assert kind.is_collapsed(records, predictions)
    assert not kind.is_collapsed(records, [{"label": "a"}, {"label": "b"}])
