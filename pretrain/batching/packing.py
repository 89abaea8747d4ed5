"""Sequences -> windows -> (rank, microbatch): the dealing of one global batch.

1. Whole sequences are packed into windows of W slots (best fit, longest first); a model that cannot be packed gets one
   sequence a window.
2. Windows, fullest first, are dealt to the ranks in snake order, which balances the ranks by tokens. Each rank splits
   its own, in that order, into as many microbatches as needed, so a padded one holds sequences of like length.
3. All microbatches of a step have the same number of rows on every rank, rounded up to one of a few bucket sizes, so
   that compiled kernels meet few shapes. Rows nobody needs are padding, and take part with weight zero.

Pure functions of (lengths, world size, microbatch size); every rank computes the same dealing and takes its share.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROW_BUCKETS = 16  # a microbatch has a multiple of 1/16 of the largest number of rows


@dataclass(frozen=True)
class Windows:
    """Where each of S sequences lies in the windows."""

    window: NDArray[np.int64]  # [S]
    offset: NDArray[np.int64]  # [S] first slot
    count: int


@dataclass(frozen=True)
class Assignment:
    """Where each of S sequences is computed."""

    rank: NDArray[np.int64]  # [S]
    microbatch: NDArray[np.int64]  # [S]
    row: NDArray[np.int64]  # [S]
    offset: NDArray[np.int64]  # [S] first slot in the row
    microbatches: int  # on every rank
    rows: int  # of every microbatch


def pack(lengths: NDArray[np.int64], width: int) -> Windows:
    """Best-fit-decreasing bin packing of sequences (longest <= width) into windows of `width` slots.

    Windows are kept by their free slots, and a bit per free size tells which sizes exist, so that the best fit is found
    by a shift and a lowest-set-bit (cf. Krell et al. 2021, "Efficient sequence packing without cross-contamination").
    """
    window = np.empty(len(lengths), dtype=np.int64)
    offset = np.empty(len(lengths), dtype=np.int64)
    by_free: list[list[int]] = [[] for _ in range(width + 1)]
    sizes = 0  # bit f is set where by_free[f] is not empty
    count = 0
    order = np.argsort(-lengths, kind="stable")
    for sequence, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = sizes >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            target = by_free[free].pop()
            if not by_free[free]:
                sizes ^= 1 << free
        else:
            free, target, count = width, count, count + 1
        window[sequence], offset[sequence] = target, width - free
        rest = free - length
        if rest:
            by_free[rest].append(target)
            sizes |= 1 << rest
    return Windows(window, offset, count)


def one_each(lengths: NDArray[np.int64]) -> Windows:
    """One sequence a window, for models that train padded."""
    return Windows(np.arange(len(lengths)), np.zeros(len(lengths), dtype=np.int64), len(lengths))


def deal(lengths: NDArray[np.int64], windows: Windows, world_size: int, max_rows: int) -> Assignment:
    """Deal windows to (rank, microbatch, row), balanced by tokens. `max_rows`: windows that fit one microbatch."""
    filled = np.bincount(windows.window, weights=lengths, minlength=windows.count).astype(np.int64)
    fullest_first = np.argsort(-filled, kind="stable")
    microbatches = max(1, -(-windows.count // (world_size * max_rows)))
    bucket = max(1, max_rows // _ROW_BUCKETS)
    rows = -(-windows.count // (world_size * microbatches))
    rows = min(max_rows, max(1, -(-rows // bucket)) * bucket)

    # Ranks take windows in turns, back and forth: their shares differ by one window at most.
    turn, seat = np.divmod(np.arange(windows.count), world_size)
    rank = np.where(turn % 2 == 1, world_size - 1 - seat, seat)
    bounds = np.arange(microbatches + 1) * -(-windows.count // world_size) // microbatches
    microbatch = np.searchsorted(bounds, turn, side="right") - 1
    row = turn - bounds[microbatch]
    assert not row.size or row.max() < rows

    def of_sequence(of_place: NDArray[np.int64]) -> NDArray[np.int64]:
        of_window = np.empty_like(of_place)
        of_window[fullest_first] = of_place
        return of_window[windows.window]

    return Assignment(of_sequence(rank), of_sequence(microbatch), of_sequence(row), windows.offset, microbatches, rows)
