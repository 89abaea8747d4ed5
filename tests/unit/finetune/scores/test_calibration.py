from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax

from finetune.kinds.classification import Config, Kind
from finetune.scores.calibration import (
    Classified,
    calibration_error,
    fit_temperature,
    measure_calibration,
    pad_probabilities,
    scale,
)

KIND = Kind(Config(), ("a", "b"))


def classify(targets: Sequence[int], probabilities: Any) -> Classified:
    found = np.array(targets)
    return Classified(found, np.array(probabilities), np.argmax(probabilities, axis=1) == found)


def test_the_error_of_a_case_counted_by_hand() -> None:
    """Catches bins that are not weighted by their sizes, and a confidence that is not that of the predicted label.

    Confidences 0.9 and 0.92 share a bin, one of two is right: |1.82 - 1|; 0.6 alone, right: |0.6 - 1|; of 3 records.
    """
    probabilities = [[0.9, 0.1], [0.08, 0.92], [0.6, 0.4]]
    assert calibration_error(classify([0, 0, 0], probabilities)) == pytest.approx((0.82 + 0.4) / 3)


def test_the_upper_end_of_a_bin_belongs_to_it() -> None:
    """Catches 6/15, the end of the sixth of 15 bins, in the seventh. 0.4 and 0.36 share a bin, one of two is right."""
    probabilities = [[0.4, 0.3, 0.3], [0.36, 0.32, 0.32]]
    expected = abs(0.4 + 0.36 - 1) / 2
    assert calibration_error(classify([0, 1], probabilities)) == pytest.approx(expected)


@pytest.mark.parametrize("confidence", [1.0, 0.5])
def test_calibrated_probabilities_have_no_error(confidence: float) -> None:
    """Catches a confidence of 1, or one at the border of bins, that falls out of the bins."""
    probabilities = [[confidence, 1 - confidence]] * 4
    targets = [0] * round(4 * confidence) + [1] * round(4 * (1 - confidence))
    assert calibration_error(classify(targets, probabilities)) == pytest.approx(0.0)


def test_the_temperature_undoes_a_known_one() -> None:
    """Catches an optimizer that stops elsewhere, or returns the logarithm or the inverse."""
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(20_000, 3)) * 2
    targets = (draw.random((20_000, 1)) > softmax(logits, axis=1).cumsum(axis=1)[:, :2]).sum(axis=1)
    too_sure = classify(targets, softmax(3 * logits, axis=1))
    temperature = fit_temperature(too_sure)
    assert temperature == pytest.approx(3.0, rel=0.05)
    _, measured = measure_calibration({"validation": too_sure})
    assert measured["validation"]["calibrated_ece"] < 0.01 < 0.1 < measured["validation"]["ece"]


def test_scaling_divides_logits() -> None:
    """Catches a power of probabilities that is not normalized, and NaN for a probability of 0."""
    logits = np.array([[1.0, 2.0, -1.0], [0.0, 0.0, 5.0]])
    assert scale(softmax(logits, axis=1), 2.5) == pytest.approx(softmax(logits / 2.5, axis=1))
    assert scale(np.array([1.0, 0.0]), 0.5) == pytest.approx([1.0, 0.0])


def test_a_perfect_model_has_a_temperature_within_the_range() -> None:
    """Catches a search that runs to 0 and divides by it."""
    perfect = classify([0, 1], [[0.7, 0.3], [0.4, 0.6]])
    assert 0.05 <= fit_temperature(perfect) < 0.1


def test_a_calibrated_prediction_keeps_its_other_parts() -> None:
    """Catches labels in another order, or a lost answer."""
    prediction = {"label": "b", "probabilities": {"a": 0.2, "b": 0.8}}
    found = KIND.calibrate(prediction, 2.0)
    assert found["label"] == "b"
    assert found["probabilities"] == pytest.approx({"a": 1 / 3, "b": 2 / 3})


def test_rows_with_fewer_choices() -> None:
    """Catches a choice that does not exist being given a probability, and lists of probabilities being refused."""
    predictions = [{"probabilities": [0.2, 0.3, 0.5]}, {"probabilities": [0.8, 0.2]}]
    padded = pad_probabilities(predictions)
    assert padded.tolist() == [[0.2, 0.3, 0.5], [0.8, 0.2, 0.0]]
    assert scale(padded, 20.0)[1].tolist() == [*KIND.calibrate(predictions[1], 20.0)["probabilities"], 0.0]
    classified = classify([2, 0], padded)
    assert classified.losses == pytest.approx([-np.log(0.5), -np.log(0.8)])
