"""Is one model better than another? The Multi-Bootstrap of Sellam et al. (2022), https://arxiv.org/abs/2106.16163.

A score varies with the seed and with the records of the test split. Both are drawn with replacement: the records once
for all models, which makes the test a paired one, the seeds for each model separately, because seeds of different
initializations have nothing in common. With one seed it is the paired bootstrap over records.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]  # R resamples
Score = Callable[[int, Sequence[int]], float]
"""(number of the seed, numbers of the drawn records) -> score"""


@dataclass(frozen=True)
class Difference:
    """By how much the score of one model is above that of another."""

    mean: float
    interval: tuple[float, float]  # 95 %
    p: float  # two-sided, of no difference


def draw_records(count: int, resamples: int, seed: int = 0) -> NDArray[np.int64]:
    """R × count numbers of records, to be used for all models."""
    return np.random.default_rng(seed).integers(0, count, size=(resamples, count))


def bootstrap_scores(score: Score, seeds: int, records: NDArray[np.int64], stream: int) -> Scores:
    """The score, as a mean over drawn seeds, for each row of `records`.

    stream: another number for each model, so that its seeds are drawn separately.
    """
    draw = np.random.default_rng([stream, seeds])
    scores = np.empty(len(records))
    for resample, rows in enumerate(records.tolist()):
        drawn, counts = np.unique(draw.integers(0, seeds, size=seeds), return_counts=True)
        scores[resample] = np.average([score(int(seed), rows) for seed in drawn], weights=counts)
    return scores


def compare_scores(observed: float, first: Scores, second: Scores) -> Difference:
    """observed: the difference of the two scores as measured.

    The p-value counts the resamples on the other side of zero, twice; it is at least 2 / (R + 1).
    """
    differences = first - second
    low, high = np.percentile(differences, [2.5, 97.5])
    opposite = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
    return Difference(observed, (float(low), float(high)), min(1.0, 2 * (opposite + 1) / (len(differences) + 1)))
