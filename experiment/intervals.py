"""Confidence intervals that pretraining and fine-tuning report."""

import math
from statistics import NormalDist


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of `count` independent draws (Wilson 1927). Without scipy, which takes a
    second to import."""
    z = NormalDist().inv_cdf(0.975)
    center = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return max(0.0, center - half), min(1.0, center + half)
