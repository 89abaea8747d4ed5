"""Sequences -> packed rows -> (rank, microbatch, row): the assignment of one global batch.

1. Whole sequences are packed into rows of W slots (best fit, longest first). A model that does not support packing gets
   one sequence per row.
2. Rows, fullest first, are assigned to ranks in snake order, which balances the ranks by tokens. Each rank splits its
   rows, in that order, into as few microbatches as hold them, so a padded microbatch has sequences of similar length.
3. All microbatches of a step have the same number of rows on every rank, rounded up to one of a few bucket sizes, so
   that compiled kernels see few shapes. Surplus rows are padding with weight zero.

Pure functions of (lengths, world size, microbatch size): every rank computes the same assignment and takes its share.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROW_BUCKETS = 16  # a microbatch has a multiple of 1/16 of the maximum number of rows


@dataclass(frozen=True)
class MicrobatchLayout:
    """The shape of a microbatch, and how sequences fill its rows."""

    width: int  # W, slots in a row: the longest sequence, special tokens included
    microbatch_tokens: int  # slots that a rank computes at once
    packed: bool = True  # several sequences share a row; False: one sequence per row, padded
    first_position: int = 0  # position id of a sequence's first token; padding_idx + 1 in the RoBERTa family

    @property
    def max_rows(self) -> int:
        return max(1, self.microbatch_tokens // self.width)


@dataclass(frozen=True)
class PackedRows:
    """Where each of S sequences lies in the packed rows of a global batch."""

    row: NDArray[np.int64]  # [S]
    offset: NDArray[np.int64]  # [S] first slot in the row
    count: int  # of rows


@dataclass(frozen=True)
class Assignment:
    """Where each of S sequences is computed."""

    rank: NDArray[np.int64]  # [S]
    microbatch: NDArray[np.int64]  # [S]
    row: NDArray[np.int64]  # [S] in the microbatch
    offset: NDArray[np.int64]  # [S] first slot in the row
    microbatches: int  # on every rank
    rows: int  # of every microbatch

    def first_slots(self, width: int) -> NDArray[np.int64]:
        """[S] each sequence's first slot in its rank's flattened microbatches, whose rows have `width` slots."""
        return (self.microbatch * self.rows + self.row) * width + self.offset


def pack(lengths: NDArray[np.int64], width: int) -> PackedRows:
    """Best-fit-decreasing bin packing of sequences with these lengths [S] (at most `width`) into rows of `width` slots.

    Rows are grouped by their free slots, and a bit mask tells which group sizes exist, so that the best fit is a shift
    and a lowest set bit (cf. Krell et al. 2021, "Efficient sequence packing without cross-contamination").
    """
    row = np.empty(len(lengths), dtype=np.int64)
    offset = np.empty(len(lengths), dtype=np.int64)
    by_free: list[list[int]] = [[] for _ in range(width + 1)]
    sizes = 0  # bit f is set if by_free[f] is not empty
    count = 0
    longest_first = np.argsort(-lengths, kind="stable")
    for sequence, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        fitting = sizes >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            target = by_free[free].pop()
            if not by_free[free]:
                sizes ^= 1 << free
        else:
            free, target, count = width, count, count + 1
        row[sequence], offset[sequence] = target, width - free
        rest = free - length
        if rest:
            by_free[rest].append(target)
            sizes |= 1 << rest
    return PackedRows(row, offset, count)


def one_per_row(lengths: NDArray[np.int64]) -> PackedRows:
    """One sequence per row, for models that train padded."""
    return PackedRows(np.arange(len(lengths)), np.zeros(len(lengths), dtype=np.int64), len(lengths))


def assign_to_ranks(lengths: NDArray[np.int64], packed: PackedRows, world_size: int, max_rows: int) -> Assignment:
    """Assign rows to (rank, microbatch, row of the microbatch), balanced by tokens.

    Args: lengths [S] of the sequences in `packed`; max_rows: how many rows fit one microbatch.
    """
    filled = np.bincount(packed.row, weights=lengths, minlength=packed.count).astype(np.int64)
    fullest_first = np.argsort(-filled, kind="stable")
    microbatches = max(1, -(-packed.count // (world_size * max_rows)))
    bucket = max(1, max_rows // _ROW_BUCKETS)
    rows = -(-packed.count // (world_size * microbatches))
    rows = min(max_rows, max(1, -(-rows // bucket)) * bucket)

    # Snake order: each round gives every rank one row, alternately first to last and last to first rank.
    round_, place = np.divmod(np.arange(packed.count), world_size)
    rank = np.where(round_ % 2 == 1, world_size - 1 - place, place)
    bounds = np.arange(microbatches + 1) * -(-packed.count // world_size) // microbatches
    microbatch = np.searchsorted(bounds, round_, side="right") - 1
    row = round_ - bounds[microbatch]
    assert not row.size or row.max() < rows

    def by_sequence(by_fullness: NDArray[np.int64]) -> NDArray[np.int64]:
        by_row = np.empty_like(by_fullness)
        by_row[fullest_first] = by_fullness
        return by_row[packed.row]

    return Assignment(by_sequence(rank), by_sequence(microbatch), by_sequence(row), packed.offset, microbatches, rows)
