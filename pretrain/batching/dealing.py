"""Sequences -> (rank, microbatch, slot) for flat microbatches: one row of T slots on every rank, without packing.

1. Sequences, longest first, are dealt to all microbatches of all ranks, round by round, so that every microbatch gets
   one of each length class: equal tokens, and equal attention FLOPs.
2. T is the fullest microbatch, rounded up to one of a few sizes. It never exceeds the capacity of a microbatch.

With many sequences per microbatch, the fullest has hardly more tokens than the mean: more than 98 % of the slots are
real tokens, where rows of fixed width lose up to a sixth.
"""

import numpy as np
from numpy.typing import NDArray

from pretrain.batching.packing import Assignment, longest_first, round_up, stable_argsort

_SLOT_PARTS = 64  # T is rounded up by less than one part in 64
_LEVELLED_ROUNDS = 128  # later rounds hold the shortest sequences of many, and need not be levelled


def deal(lengths: NDArray[np.int64], world_size: int, capacity: int) -> Assignment:
    """Assign sequences with these lengths [S], at most `capacity`, to microbatches of at most `capacity` slots."""
    order = longest_first(lengths)
    falling = lengths[order]
    microbatches = max(1, -(-int(lengths.sum()) // (world_size * capacity)))
    dealt, tokens = _deal_level(falling, world_size * microbatches)
    while tokens.max() > capacity:
        microbatches += 1
        dealt, tokens = _deal_level(falling, world_size * microbatches)
    together = stable_argsort(dealt)  # by microbatch, and in it longest first
    before = np.cumsum(falling[together]) - falling[together]
    own_before = before - (np.cumsum(tokens) - tokens)[dealt[together]]
    bins, offset = np.empty_like(dealt), np.empty_like(dealt)
    bins[order], offset[order[together]] = dealt, own_before
    slots = min(capacity, round_up(max(1, int(tokens.max())), _SLOT_PARTS))
    microbatch, rank = np.divmod(bins, world_size)
    return Assignment(rank, microbatch, np.zeros_like(rank), offset, microbatches, rows=1, width=slots)


def _deal_level(falling: NDArray[np.int64], bins: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The bin [S] of each length, and the sum [bins] of the lengths in each bin.

    In each of the first rounds, the longest goes to the bin that has least (cf. Graham 1969, "Bounds on multiprocessing
    timing anomalies"); further rounds alternate between this order and its reverse.
    """
    dealt, tokens = np.empty_like(falling), np.zeros(bins, dtype=np.int64)
    levelled = min(len(falling), _LEVELLED_ROUNDS * bins)
    for start in range(0, levelled, bins):
        of_round = falling[start : start + bins]
        emptiest = np.argsort(tokens, kind="stable")[: len(of_round)]
        dealt[start : start + len(of_round)] = emptiest
        tokens[emptiest] += of_round
    round_, place = np.divmod(np.arange(len(falling) - levelled), bins)
    dealt[levelled:] = np.argsort(tokens, kind="stable")[np.where(round_ % 2 == 1, bins - 1 - place, place)]
    return dealt, np.bincount(dealt, weights=falling, minlength=bins).astype(np.int64)
