"""Confidence intervals of scores, and tests of their differences."""

import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiment.intervals import wilson_interval

FEWEST_UNITS = 6
"""Units of a test split that a difference needs: of five, even five wins have a two-sided p of 2 / 2⁵ = 0.06."""

_ROUNDING = 1e-9  # largest error of a sum of right answers

Scores = NDArray[np.float64]  # R resamples
Score = Callable[[int, NDArray[np.int64]], float]
"""(number of the seed, numbers of the drawn records) -> score"""

Interval = tuple[float, float]
"""Low and high end of a confidence interval of 95 %."""


@dataclass(frozen=True)
class Difference:
    """The difference of the scores of two models, as in compare.json."""

    difference: float  # of the means over seeds
    interval: Interval | None  # None without resamples
    p: float | None  # two-sided p-value; null hypothesis: no difference


def draw_records(units: Sequence[Sequence[int]], resamples: int) -> Iterator[NDArray[np.int64]]:
    """Yield R samples of numbers of records. Each call yields the same samples, one for each model.

    units: numbers of records that are drawn together, because they are not independent.
    """
    numbers, sizes = np.concatenate(units), np.array([len(unit) for unit in units])
    starts = sizes.cumsum() - sizes
    draw = np.random.default_rng(0)
    for _ in range(resamples):
        drawn = draw.integers(0, len(units), size=len(units))
        ends = sizes[drawn].cumsum()
        yield numbers[np.arange(ends[-1]) + np.repeat(starts[drawn] - ends + sizes[drawn], sizes[drawn])]


def bootstrap_scores(score: Score, seeds: int, samples: Iterable[NDArray[np.int64]], stream: int) -> Scores:
    """Return the score, as a mean over drawn seeds, for each sample of records.

    This is the Multi-Bootstrap of Sellam et al. (2022), https://arxiv.org/abs/2106.16163. A score varies with the seed
    and with the records of the test split. Both are drawn with replacement: the records once for all models, which
    makes the test a paired one, the seeds for each model separately, because seeds of different initializations have
    nothing in common. With one seed it is the paired bootstrap over records.

    stream: another number for each model, so that its seeds are drawn separately.
    """
    draw = np.random.default_rng([stream, seeds])
    scores = []
    for sample in samples:
        drawn, counts = np.unique(draw.integers(0, seeds, size=seeds), return_counts=True)
        scores.append(np.average([score(int(seed), sample) for seed in drawn], weights=counts))
    return np.array(scores)


def compare_scores(
    first: Sequence[float], second: Sequence[float], first_drawn: Scores, second_drawn: Scores
) -> Difference:
    """Return the difference of the mean scores over seeds. first, second: scores by seed; drawn: as from
    `bootstrap_scores`; without resamples there is no test.

    The p-value of the bootstrap counts the resamples on the other side of zero, twice; it is at least 2 / (R + 1).
    From few seeds a bootstrap finds differences where there are none: n draws of n seeds vary less than n new seeds.
    So the result is the more cautious one of the bootstrap and of Welch's (1947) test of the scores by seed.
    """
    difference, differences = float(np.mean(first) - np.mean(second)), first_drawn - second_drawn
    if not len(differences):
        return Difference(difference, None, None)
    opposite = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
    # Ends that are resamples exclude zero exactly if p is below 0.05; interpolated ones, also slightly above it.
    low, high = np.percentile(differences, 2.5, method="lower"), np.percentile(differences, 97.5, method="higher")
    p = min(1.0, 2 * (opposite + 1) / (len(differences) + 1))
    if min(len(first), len(second)) > 1 and np.ptp(first) + np.ptp(second) > _ROUNDING:
        from scipy.stats import ttest_ind  # takes a second

        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of equal scores by all seeds of one
            welch = ttest_ind(first, second, equal_var=False)
            by_seed = welch.confidence_interval()
        low, high, p = min(low, by_seed.low), max(high, by_seed.high), max(p, welch.pvalue)
    return Difference(difference, (float(low), float(high)), float(p))


def percentile_interval(scores: Scores) -> Interval | None:
    """Return the 95 % interval of bootstrap scores, if there are any."""
    if not len(scores):
        return None
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)


def accuracy_interval(is_correct: Sequence[bool], groups: Sequence[Hashable]) -> Interval:
    """Return the interval of an accuracy, for other questions of the same kind.

    groups: the subject of each question. If each has its own, Wilson's (1927) interval. Otherwise Student's interval
    of a ratio over groups (Cochran 1977, sections 6.3 and 9A.2): questions about one text are not independent, and an
    interval that ignores it is too narrow. If all groups are alike, it has no width: Wilson's interval of as many
    questions as there are groups.
    """
    from scipy.special import stdtrit

    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    ids = np.array([numbers[group] for group in groups])
    counts, hits = np.bincount(ids), np.bincount(ids, weights=is_correct)
    accuracy, drawn = float(np.mean(is_correct)), len(counts)
    residuals = hits - accuracy * counts
    if drawn == len(is_correct) or np.abs(residuals).max() < _ROUNDING:
        return wilson_interval(accuracy, drawn)
    error = np.sqrt((residuals**2).sum() * drawn / (drawn - 1)) / len(is_correct)
    half = float(stdtrit(drawn - 1, 0.975) * error)
    return max(0.0, accuracy - half), min(1.0, accuracy + half)
