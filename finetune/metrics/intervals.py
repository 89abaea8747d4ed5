"""Confidence intervals of scores."""

from collections.abc import Hashable, Sequence

import numpy as np
from scipy.stats import binomtest

Interval = tuple[float, float]
"""Low and high end of a confidence interval of 95 %."""

_RESAMPLES = 10_000


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
