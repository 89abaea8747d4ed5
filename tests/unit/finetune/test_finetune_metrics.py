import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import binomtest
from sklearn import metrics
from sklearn.metrics import precision_recall_fscore_support

from finetune.data.records import Record
from finetune.kinds.classification import Config, Kind
from finetune.metrics import (
    Classified,
    Difference,
    Score,
    accuracy_interval,
    bootstrap_scores,
    calibrate,
    calibration_error,
    classification_scores,
    compare_scores,
    confusion_matrix,
    counted_pairs,
    draw_records,
    fit_temperature,
    is_constant,
    label_scores,
    pad_probabilities,
    scale,
    summarize,
    top_confusions,
)

LABELS = ("a", "b", "c", "d")

RECORDS = 400


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


def test_scores_are_those_of_scikit_learn() -> None:
    """Catches precision and recall mixed up, and a division by zero for a label that is never predicted or never
    occurs."""
    gold, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 3, 0])
    expected = precision_recall_fscore_support(gold, predicted, labels=range(4), zero_division=0.0)
    found = label_scores(gold, predicted, LABELS)
    for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [found[label][name] for label in LABELS] == pytest.approx(values.tolist())


def test_pairs_are_those_that_a_matrix_counts() -> None:
    """Catches pairs that are transposed, and mistakes in another order than that of the matrix."""
    gold, predicted = np.random.default_rng(0).integers(0, 4, size=(2, 200))
    matrix = confusion_matrix(gold, predicted, 4)
    assert np.array_equal(matrix, metrics.confusion_matrix(gold, predicted))
    assert np.array_equal(confusion_matrix(*counted_pairs(matrix), 4), matrix)
    found = top_confusions(gold, predicted, LABELS, count=99)
    assert found == top_confusions(*counted_pairs(matrix), LABELS, count=99)
    counts = matrix - np.diag(np.diag(matrix))
    order = [divmod(place, 4) for place in np.argsort(-counts, axis=None, kind="stable")[:12].tolist()]
    assert [(mistake["label"], mistake["predicted"]) for mistake in found] == [(LABELS[a], LABELS[b]) for a, b in order]


def test_mistakes_are_ordered_by_count() -> None:
    """Catches right answers among the mistakes, transposed labels, and mistakes that never happened."""
    matrix = np.array([[9, 1, 0, 0], [4, 5, 1, 0], [0, 0, 3, 0], [0, 0, 0, 0]])
    assert top_confusions(*counted_pairs(matrix), LABELS) == [
        {"label": "b", "predicted": "a", "count": 4, "share": 0.4},
        {"label": "a", "predicted": "b", "count": 1, "share": 0.1},
        {"label": "b", "predicted": "c", "count": 1, "share": 0.1},
    ]
    assert len(top_confusions(*counted_pairs(matrix), LABELS, count=2)) == 2


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


def test_the_error_of_a_case_counted_by_hand() -> None:
    """Catches bins that are not weighted by their sizes, and a confidence that is not that of the predicted label.

    Confidences 0.9 and 0.92 share a bin, one of two is right: |1.82 - 1|; 0.6 alone, right: |0.6 - 1|; of 3 records.
    """
    probabilities = np.array([[0.9, 0.1], [0.08, 0.92], [0.6, 0.4]])
    assert calibration_error(Classified(np.array([0, 0, 0]), probabilities)) == pytest.approx((0.82 + 0.4) / 3)


def test_the_upper_end_of_a_bin_belongs_to_it() -> None:
    """Catches 6/15, the end of the sixth of 15 bins, in the seventh. 0.4 and 0.36 share a bin, one of two is right."""
    probabilities = np.array([[0.4, 0.3, 0.3], [0.36, 0.32, 0.32]])
    expected = abs(0.4 + 0.36 - 1) / 2
    assert calibration_error(Classified(np.array([0, 1]), probabilities)) == pytest.approx(expected)


@pytest.mark.parametrize("confidence", [1.0, 0.5])
def test_calibrated_probabilities_have_no_error(confidence: float) -> None:
    """Catches a confidence of 1, or one at the border of bins, that falls out of the bins."""
    probabilities = np.array([[confidence, 1 - confidence]] * 4)
    gold = np.array([0] * round(4 * confidence) + [1] * round(4 * (1 - confidence)))
    assert calibration_error(Classified(gold, probabilities)) == pytest.approx(0.0)


def test_the_temperature_undoes_a_known_one() -> None:
    """Catches an optimizer that stops elsewhere, or returns the logarithm or the inverse."""
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(20_000, 3)) * 2
    gold = np.array([draw.choice(3, p=row) for row in softmax(logits, axis=1)])
    too_sure = Classified(gold, softmax(3 * logits, axis=1))
    temperature = fit_temperature(too_sure)
    assert temperature == pytest.approx(3.0, rel=0.05)
    after = Classified(gold, scale(too_sure.probabilities, temperature))
    assert calibration_error(after) < 0.01 < 0.1 < calibration_error(too_sure)


def test_scaling_divides_logits() -> None:
    """Catches a power of probabilities that is not normalized, and NaN for a probability of 0."""
    logits = np.array([[1.0, 2.0, -1.0], [0.0, 0.0, 5.0]])
    assert scale(softmax(logits, axis=1), 2.5) == pytest.approx(softmax(logits / 2.5, axis=1))
    assert scale(np.array([1.0, 0.0]), 0.5) == pytest.approx([1.0, 0.0])


def test_a_perfect_model_has_a_temperature_within_the_range() -> None:
    """Catches a search that runs to 0 and divides by it."""
    perfect = Classified(np.array([0, 1]), np.array([[0.7, 0.3], [0.4, 0.6]]))
    assert 0.05 <= fit_temperature(perfect) < 0.1


def test_a_calibrated_prediction_keeps_its_other_parts() -> None:
    """Catches labels in another order, or a lost answer."""
    prediction = {"label": "b", "probabilities": {"a": 0.2, "b": 0.8}}
    found = calibrate(prediction, 2.0)
    assert found["label"] == "b"
    assert found["probabilities"] == pytest.approx({"a": 1 / 3, "b": 2 / 3})


def test_rows_with_fewer_choices() -> None:
    """Catches a choice that does not exist being given a probability, and lists of probabilities being refused."""
    predictions = [{"probabilities": [0.2, 0.3, 0.5]}, {"probabilities": [0.8, 0.2]}]
    padded = pad_probabilities(predictions)
    assert padded.tolist() == [[0.2, 0.3, 0.5], [0.8, 0.2, 0.0]]
    assert scale(padded, 20.0)[1].tolist() == [*calibrate(predictions[1], 20.0)["probabilities"], 0.0]
    classified = Classified(np.array([2, 0]), padded)
    assert classified.losses == pytest.approx([-np.log(0.5), -np.log(0.8)])


def accuracy(right: np.ndarray) -> Score:
    """right: seeds x records."""

    def score(seed: int, rows: Sequence[int]) -> float:
        return float(right[seed, rows].mean())

    return score


def compare(first: np.ndarray, second: np.ndarray, resamples: int = 2000) -> Difference:
    units = [[number] for number in range(first.shape[1])]
    scores = [
        bootstrap_scores(accuracy(right), len(right), draw_records(units, resamples), stream)
        for stream, right in enumerate((first, second))
    ]
    return compare_scores(first.mean(axis=1), second.mean(axis=1), *scores)


def answers(share: float, seeds: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((seeds, RECORDS)) < share


def test_a_model_is_not_better_than_itself() -> None:
    """Catches a test that finds differences where there are none, and records drawn separately for each model."""
    right = answers(0.7, 1, 0)
    found = compare(right, right)
    assert found.p == 1.0
    assert found.interval == (0.0, 0.0)


def test_a_large_difference_is_found_and_has_a_sign() -> None:
    """Catches models that are swapped, and a p-value below what the number of resamples allows."""
    better, worse = answers(0.9, 3, 0), answers(0.6, 3, 1)
    found, swapped = compare(better, worse), compare(worse, better)
    assert 0.2 < found.interval[0] < found.difference < found.interval[1] < 0.4
    assert swapped.difference == -found.difference
    assert found.p == swapped.p == pytest.approx(2 / 2001)


def test_related_records_are_drawn_together() -> None:
    """Catches questions on one text that count as independent ones: p would be small too often."""
    units = [[0, 3], [1], [2, 4, 5]]
    samples = list(draw_records(units, 50))
    for sample in samples:
        counts = np.bincount(sample, minlength=6)
        assert all(len({counts[number] for number in unit}) == 1 for unit in units)
        assert sum(counts[unit[0]] for unit in units) == len(units)
    assert len({tuple(sorted(sample)) for sample in samples}) > 5


@pytest.mark.parametrize("count", [3, 7, 1000, 4096])
def test_samples_are_drawn_one_by_one(count: int) -> None:
    """Catches samples that are all in memory, 8 GB for a million records, and others than those drawn at once."""
    units = [[number] for number in range(count)]
    tracemalloc.start()
    samples = draw_records(units, 200)
    assert next(samples).shape == (count,)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * (count + 100) * 8  # bytes
    expected = np.random.default_rng(0).integers(0, count, size=(20, count))
    assert np.array_equal(list(draw_records([[number] for number in range(count)], 20)), expected)


def test_three_seeds_are_not_sure() -> None:
    """Catches a bootstrap alone, which calls the order of six seeds certain: by chance it is in 1 of 10 cases."""
    values = [0.800, 0.801, 0.802], [0.797, 0.798, 0.799]
    drawn = [np.random.default_rng(seed).choice(scores, (2000, 3)).mean(axis=1) for seed, scores in enumerate(values)]
    found = compare_scores(*values, *drawn)
    assert found.p == pytest.approx(0.0213, abs=1e-3)  # of Welch's test
    assert found.interval[0] < 0.001


def test_one_seed_gives_the_paired_bootstrap() -> None:
    """Catches an unpaired test, which finds little in models that are right on almost the same records.

    The exact sign test of McNemar says how likely such a difference is.
    """
    first = answers(0.7, 1, 0)
    second = first.copy()
    gained, lost = np.flatnonzero(~first[0])[:14], np.flatnonzero(first[0])[:4]
    second[0, gained], second[0, lost] = True, False
    found = compare(second, first)
    assert found.difference == pytest.approx(10 / RECORDS)
    assert found.p == pytest.approx(binomtest(14, 18).pvalue, abs=0.02)


def test_the_seeds_count_too() -> None:
    """Catches an interval for these seeds alone: with others the order might be the other way round."""
    spread = np.stack([answers(share, 1, seed)[0] for seed, share in enumerate((0.5, 0.7, 0.9))])
    steady = answers(0.68, 3, 9)
    low, high = compare(spread, steady).interval
    low_steady, high_steady = compare(answers(0.7, 3, 5), steady).interval
    assert low < 0 < high
    assert high - low > 2 * (high_steady - low_steady)


def test_independent_questions_have_wilsons_interval() -> None:
    """Catches another interval than method 3 of Newcombe (1998), whose example is 81 of 263."""
    right = [True] * 81 + [False] * (263 - 81)
    assert accuracy_interval(right, range(263)) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_questions_on_one_text_widen_the_interval() -> None:
    """Catches an interval of single questions: 50 texts of 20 questions, all right or all wrong, are 50 draws."""
    right = np.repeat(np.arange(50) % 2 == 0, 20).tolist()
    groups = np.repeat(np.arange(50), 20).tolist()
    low, high = accuracy_interval(right, [f"text {group}" for group in groups])
    spread = 2.0096 * np.sqrt(0.25 / 49)
    assert (low, high) == pytest.approx((0.5 - spread, 0.5 + spread), abs=1e-4)


@pytest.mark.parametrize("texts", [2, 3, 5, 10, 30])
def test_intervals_of_few_texts_hold(texts: int) -> None:
    """Catches an interval that is certain of an article, or too narrow for few."""
    draw = np.random.default_rng(texts)
    groups, held = np.repeat(np.arange(texts), 20), 0
    for _ in range(300):
        low, high = accuracy_interval((draw.random((texts, 20)) < draw.beta(7, 3, (texts, 1))).flatten(), groups)
        held += low <= 0.7 <= high
    assert held > 0.9 * 300
    assert accuracy_interval([True] * 35 + [False] * 15, [0] * 50)[0] < 0.2  # one text says little


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("groups", [range(10), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]])
def test_a_perfect_score_has_an_interval(right: bool, groups: Sequence[int]) -> None:
    """Catches a division by zero, bounds outside of 0 to 1, and a bootstrap that knows no other result."""
    low, high = accuracy_interval([right] * 10, groups)
    assert 0 <= low < high <= 1
