"""Is one model better than another? The Multi-Bootstrap of Sellam et al. (2022), https://arxiv.org/abs/2106.16163.

A score varies with the seed and with the records of the test split. Both are drawn with replacement: the records once
for all models, which makes the test a paired one, the seeds for each model separately, because seeds of different
initializations have nothing in common. With one seed it is the paired bootstrap over records.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

Scores = NDArray[np.float64]  # R resamples
Score = Callable[[int, Sequence[int]], float]
"""(number of the seed, numbers of the drawn records) -> score"""

Interval = tuple[float, float]
"""Low and high end of a confidence interval of 95 %."""

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """By how much the score of one model is above that of another."""

    mean: float
    interval: tuple[float, float]  # 95 %
    p: float  # two-sided, of no difference


def draw_records(count: int, resamples: int) -> NDArray[np.int64]:
    """R × count numbers of records, to be used for all models."""
    return np.random.default_rng(0).integers(0, count, size=(resamples, count))


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


def accuracy_interval(right: Sequence[bool], groups: Sequence[Hashable]) -> Interval:
    """The interval of an accuracy, for other questions of the same kind.

    groups: what each question is about. If each has its own, Wilson's (1927) interval. Otherwise the percentiles of a
    bootstrap over groups (Davison and Hinkley 1997, section 3.8): questions about one text are not independent, and an
    interval that ignores it is too narrow. If all or none are right, a bootstrap has no width: Wilson's interval of as
    many questions as there are groups.
    """
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    ids = np.array([numbers[group] for group in groups])
    counts = np.bincount(ids)
    accuracy = float(np.mean(right))
    if len(counts) == len(right) or accuracy in (0.0, 1.0):
        found = binomtest(round(accuracy * len(counts)), len(counts)).proportion_ci(method="wilson")
        return float(found.low), float(found.high)
    hits = np.bincount(ids, weights=np.asarray(right, dtype=float))
    draw = np.random.default_rng(0)
    drawn = draw.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=_RESAMPLES)
    low, high = np.percentile(drawn @ hits / (drawn @ counts), [2.5, 97.5])
    return float(low), float(high)
