"""Rank, local rank and world size."""

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """The place of this process among the ranks of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this host
