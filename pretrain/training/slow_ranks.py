"""Finds the slowest rank of each log interval, and names one that stays slow: all others wait for it."""

import logging
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from experiment.tracking.jsonl import SLOW_RATIO

log = logging.getLogger(__name__)

_INTERVALS = 5  # in a row


class SlowestRank(NamedTuple):
    rank: int
    ratio: float  # of its time to the median of all ranks


class SlowRanks:
    def __init__(self, nodes: Sequence[str]) -> None:
        """`nodes`: the host of each rank."""
        self._nodes = nodes
        self._slow: int | None = None  # rank
        self._intervals = 0  # in which it was the slowest one, and slow

    def update(self, times: Sequence[int]) -> SlowestRank | None:
        """The slowest rank of an interval; None if unknown. Warns once of a rank that was slow in several in a row.

        times: that each rank took for work in which it waits for no other rank, in any unit; 0: unknown. May be empty.
        """
        if not times or min(times) == 0:
            return None
        median = statistics.median_low(times)
        rank = max(range(len(times)), key=times.__getitem__)
        slowest = SlowestRank(rank, times[rank] / median)
        if slowest.ratio < SLOW_RATIO or rank != self._slow:
            self._slow, self._intervals = rank, 0
        if slowest.ratio >= SLOW_RATIO:
            self._intervals += 1
            if self._intervals == _INTERVALS:
                log.warning(
                    "%s, rank %d is slow: its forward passes and its waits for data took %.1f times as long as those "
                    "of the median rank, and so in the last %d log intervals",
                    self._nodes[rank],
                    rank,
                    slowest.ratio,
                    _INTERVALS,
                )
        return slowest
