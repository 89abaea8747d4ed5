"""How certain predictions are: losses, calibration of probabilities, and how well they are calibrated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BINS = 15  # of the calibration error
_TEMPERATURES = (0.05, 20.0)
_TINY = 1e-37  # least probability: its logarithm is finite


@dataclass(frozen=True)
class Classified:
    """Labels and predictions of N records, for kinds that predict one of C labels for each."""

    targets: NDArray[np.int64]  # N
    probabilities: NDArray[np.float64]  # NC
    is_correct: NDArray[np.bool_]  # N, whether the prediction counts as right: in a tie it may not

    @property
    def losses(self) -> NDArray[np.float64]:
        """N, negative log-probabilities of the labels."""
        target = np.take_along_axis(self.probabilities, self.targets[:, None], axis=1)[:, 0]
        return np.asarray(-np.log(np.maximum(target, _TINY)))


def confidence_losses(confidences: Sequence[float], correctness: Sequence[float]) -> NDArray[np.float64]:
    """Return N cross-entropies of the probabilities of N answers, and how correct the answers are, from 0 to 1."""
    p, share = np.asarray(confidences), np.asarray(correctness)
    return np.asarray(-share * np.log(np.maximum(p, _TINY)) - (1 - share) * np.log(np.maximum(1 - p, _TINY)))


def calibration_error(classified: Classified) -> float:
    """Expected calibration error: mean distance of confidence and accuracy in 15 bins of equal width, weighted by
    their sizes. The confidence is the probability of the predicted label."""
    confidence = classified.probabilities.max(axis=1)
    bins = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)  # upper ends belong to a bin
    distances = np.bincount(bins, weights=confidence - classified.is_correct, minlength=_BINS)
    return float(np.abs(distances).sum() / len(confidence))


def fit_temperature(classified: Classified) -> float:
    """Return the temperature with the lowest loss (Guo et al. 2017, "On Calibration of Modern Neural Networks"). If all
    records are predicted right, the loss falls until the lower end of the range, 0.05 to 20."""

    def loss(log_temperature: float) -> float:
        return float(_scaled(classified, float(np.exp(log_temperature))).losses.mean())

    from scipy.optimize import minimize_scalar  # takes half a second, and every kind of task imports this module

    low, high = np.log(_TEMPERATURES)
    return float(np.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x))


def measure_calibration(splits: Mapping[str, Classified | None]) -> tuple[float | None, dict[str, dict[str, float]]]:
    """Return the temperature that is best on validation, and {`ece`, `calibrated_ece`} of each split; None and {} if
    there is nothing to calibrate."""
    if (validation := splits.get("validation")) is None:
        return None, {}
    temperature = fit_temperature(validation)
    return temperature, {
        split: {
            "ece": calibration_error(found),
            "calibrated_ece": calibration_error(_scaled(found, temperature)),
        }
        for split, found in splits.items()
        if found is not None
    }


def _scaled(classified: Classified, temperature: float) -> Classified:
    return replace(classified, probabilities=scale(classified.probabilities, temperature))


def scale(probabilities: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Probabilities, along the last axis, of logits divided by a temperature. It changes no order; 0 stays 0."""
    with np.errstate(divide="ignore"):
        logits = np.log(probabilities) / temperature
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def list_probabilities(prediction: Mapping[str, Any]) -> list[float]:
    """Return the `probabilities` of a prediction, in their order."""
    probabilities = prediction["probabilities"]
    return list(probabilities.values() if isinstance(probabilities, Mapping) else probabilities)


def pad_probabilities(predictions: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """Return the probabilities NC of N predictions, C being the most that one has; the others get zeros."""
    rows = [list_probabilities(prediction) for prediction in predictions]
    width = max(map(len, rows))
    return np.array([row + [0.0] * (width - len(row)) for row in rows])
