"""Sequences -> (rank, microbatch, row): the assignment of one global batch.

Packed and padded rows:

1. Whole sequences are packed into rows of W slots (best fit, longest first). A model that does not support packing gets
   one sequence per row.
2. Rows, fullest first, are assigned to ranks in snake order, which balances the ranks by tokens. Each rank splits its
   rows, in that order, into as few microbatches as hold them. A padded microbatch has sequences of similar length: it
   is as wide as the longest of all ranks, and ends where most others would be mostly padding.
3. A microbatch has the same shape on every rank, and packed ones have the same number of rows in all microbatches of
   a step. Rows are rounded up to one of a few numbers, so that compiled kernels see few shapes. Surplus rows are
   padding with weight zero.

Flat microbatches, which have a single row of T slots, are dealt without packing:

1. Sequences, longest first, are dealt to all microbatches of all ranks, round by round, so that every microbatch gets
   one of each length class: equal tokens, and equal attention FLOPs. Where that leaves some fuller than others, as a
   few long sequences among short ones do, each sequence goes to the emptiest microbatch instead; and where one of them
   then has more than its capacity, by best fit.
2. T is the fullest microbatch, rounded up to one of a few sizes. It never exceeds the capacity of a microbatch. With
   many sequences per microbatch, the fullest has hardly more tokens than the mean: more than 98 % of the slots are real
   tokens, where rows of fixed width lose up to a sixth.

Pure functions of (lengths, world size, microbatch size): every rank computes the same assignment and takes its share.
"""

import heapq
from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

_ROW_PARTS = 8  # rows of a microbatch are rounded up by less than one part in 8
_WIDTH_BUCKET = 16  # the width of a padded microbatch is a multiple of this, or that of the longest sequence
# Memory of a padded row besides that of its slots, in slots. DeBERTa's relative positions take the most, 30 to 60.
_ROW_SLOTS = 64

RowKind = Literal["padded", "packed", "flat"]
"""How sequences fill the rows of a microbatch.

- padded: one sequence per row, for models that cannot be packed
- packed: several sequences in each row of W slots, for kernels that compare all slots of a row
- flat: all sequences in one row of T slots, for flash attention, whose cost does not depend on where rows end
"""


@dataclass(frozen=True)
class MicrobatchLayout:
    """The shape of a microbatch, and how sequences fill its rows."""

    max_seq_length: int  # slots of the longest sequence, special tokens included
    microbatch_tokens: int  # slots that a rank computes at once, at least one row
    kind: RowKind = "packed"
    first_position: int = 0  # position id of a sequence's first token; padding_idx + 1 in the RoBERTa family
    least_width: int = 0  # slots whose memory a padded row takes at least
    wide_rows: int | None = None  # slots of a packed row, if it is wider than the longest sequence

    @property
    def row_width(self) -> int:
        """W, slots of a packed or padded row."""
        return self.wide_rows or self.max_seq_length

    def padded_rows(self, width: int) -> int:
        """Return the rows of a padded microbatch of this width that take no more memory than the widest one."""
        taken = max(width, min(self.least_width, self.max_seq_length))
        rows = self.microbatch_tokens // self.max_seq_length
        return rows * (self.max_seq_length + _ROW_SLOTS) // (taken + _ROW_SLOTS)


@dataclass(frozen=True)
class PackedRows:
    """The places of S sequences in the packed rows of a global batch."""

    row: NDArray[np.int64]  # [S]
    offset: NDArray[np.int64]  # [S] first slot in the row
    count: int  # of rows


@dataclass(frozen=True)
class Assignment:
    """The rank, microbatch and slots of each of S sequences."""

    rank: NDArray[np.int64]  # [S]
    microbatch: NDArray[np.int64]  # [S]
    row: NDArray[np.int64]  # [S] in the microbatch
    offset: NDArray[np.int64]  # [S] first slot in the row
    rows: NDArray[np.int64]  # [K] of each microbatch, on every rank
    widths: NDArray[np.int64]  # [K] slots in a row of each microbatch

    @property
    def microbatches(self) -> int:
        """K, the microbatches of each rank."""
        return len(self.rows)

    @property
    def bounds(self) -> NDArray[np.int64]:
        """The slots [K + 1] at which a rank's microbatches begin, flattened, and the total."""
        return np.concatenate([[0], np.cumsum(self.rows * self.widths)])

    def first_slots(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the first slot of each of these sequences in its rank's flattened microbatches; same shape."""
        microbatch = self.microbatch[sequences]
        return self.bounds[microbatch] + self.row[sequences] * self.widths[microbatch] + self.offset[sequences]


def pack(lengths: NDArray[np.int64], width: int) -> PackedRows:
    """Best-fit-decreasing bin packing of sequences with these lengths [S] (at most `width`) into rows of `width` slots.

    Rows are grouped by their free slots (cf. Krell et al. 2021, "Efficient sequence packing without
    cross-contamination"). Of equally free rows, the last to become so is filled first.
    """
    order = longest_first(lengths)
    by_free = defaultdict[int, list[int]](list)  # rows, by free slots
    sizes, count = list[int](), 0  # sizes: those with a row, rising
    rows, offsets = list[int](), list[int]()
    for length in lengths[order].tolist():
        fit = bisect_left(sizes, length)
        if fit < len(sizes):
            free = sizes[fit]
            row = by_free[free].pop()
            if not by_free[free]:
                del sizes[fit]
        else:
            free, row, count = width, count, count + 1
        rows.append(row)
        offsets.append(width - free)
        if left := free - length:
            if not by_free[left]:
                insort(sizes, left)
            by_free[left].append(row)
    row_of, offset = np.empty_like(order), np.empty_like(order)
    row_of[order], offset[order] = rows, offsets
    return PackedRows(row_of, offset, count)


def longest_first(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the order [S] of falling lengths; equal ones keep their order."""
    return stable_argsort(lengths.max(initial=0) - lengths)


def stable_argsort(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the order of rising values, none of them negative; equal ones keep their order."""
    # numpy sorts 16-bit integers by radix, ten times faster.
    return np.argsort(values.astype(np.uint16) if values.max(initial=0) < 1 << 16 else values, kind="stable")


def round_up(count: int, parts: int) -> int:
    """Return the next multiple of a power of two that is larger by less than one part in `parts`; few counts remain."""
    step = 1 << max(0, (count // parts).bit_length() - 1)
    return -(-count // step) * step


def next_multiple(count: int, divisor: int) -> int:
    """Round `count` up to a multiple of `divisor`; at least `divisor`."""
    return max(1, -(-count // divisor)) * divisor


def one_per_row(lengths: NDArray[np.int64]) -> PackedRows:
    """Put one sequence in each row, for models that train padded."""
    return PackedRows(np.arange(len(lengths)), np.zeros(len(lengths), dtype=np.int64), len(lengths))


def assign_to_ranks(
    lengths: NDArray[np.int64], packed: PackedRows, world_size: int, layout: MicrobatchLayout
) -> Assignment:
    """Assign rows to (rank, microbatch, row of the microbatch), balanced by tokens.

    `lengths` [S]: of the sequences in `packed`.
    """
    filled = np.bincount(packed.row, weights=lengths, minlength=packed.count).astype(np.int64)
    fullest_first = longest_first(filled)
    split = _split_padded if layout.kind == "padded" else _split_packed
    bounds, rows, widths = split(filled[fullest_first[::world_size]], layout)

    # Snake order: each round gives every rank one row, alternately first to last and last to first rank.
    round_, place = np.divmod(np.arange(packed.count), world_size)
    rank = np.where(round_ % 2 == 1, world_size - 1 - place, place)
    microbatch = np.searchsorted(bounds, round_, side="right") - 1
    row = round_ - bounds[microbatch]

    def by_sequence(by_fullness: NDArray[np.int64]) -> NDArray[np.int64]:
        by_row = np.empty_like(by_fullness)
        by_row[fullest_first] = by_fullness
        return by_row[packed.row]

    where = by_sequence(rank), by_sequence(microbatch), by_sequence(row), packed.offset
    return Assignment(*where, rows, widths)


_Split = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""Where each microbatch begins among the R rows of a rank, and R, [K + 1]; its rows and its width, [K] each."""


def _split_packed(filled: NDArray[np.int64], layout: MicrobatchLayout) -> _Split:
    """Split the rows of a rank, filled [R], into microbatches of the same shape."""
    max_rows = layout.microbatch_tokens // layout.row_width
    count = -(-len(filled) // max_rows)
    bounds = np.arange(count + 1) * len(filled) // count
    rows = min(max_rows, round_up(int(np.diff(bounds).max()), _ROW_PARTS))
    return bounds, np.full(count, rows), np.full(count, layout.row_width)


def _split_padded(filled: NDArray[np.int64], layout: MicrobatchLayout) -> _Split:
    """Split the rows of a rank into microbatches, each as wide as its first row, the longest. Rows at most half as long
    get another one if that saves a quarter of a microbatch's tokens. `filled` [R]: the longest of the ranks' rows in
    each place, falling.
    """
    bounds, rows, widths = [0], [], []
    while (first := bounds[-1]) < len(filled):
        width = min(layout.max_seq_length, next_multiple(int(filled[first]), _WIDTH_BUCKET))
        max_rows = layout.padded_rows(width)
        fitting = filled[first : first + max_rows]
        longer = int((2 * fitting > width).sum())
        saves = longer > 0 and 2 * (len(fitting) - longer) * width >= layout.microbatch_tokens
        bounds.append(first + (longer if saves else len(fitting)))
        rows.append(min(max_rows, round_up(bounds[-1] - first, _ROW_PARTS)))
        widths.append(width)
    return np.array(bounds), np.array(rows), np.array(widths)


def assign(lengths: NDArray[np.int64], world_size: int, layout: MicrobatchLayout) -> Assignment:
    """Assign sequences with these lengths [S], at most `layout.max_seq_length`, to the microbatches of all ranks."""
    assert layout.microbatch_tokens >= layout.row_width
    if layout.kind == "flat":
        return deal(lengths, world_size, layout.microbatch_tokens)
    rows = one_per_row(lengths) if layout.kind == "padded" else pack(lengths, layout.row_width)
    return assign_to_ranks(lengths, rows, world_size, layout)


_SLOT_PARTS = 64  # T is rounded up by less than one part in 64
_LEVELLED_ROUNDS = 128  # later rounds hold the shortest sequences of many, and need not be levelled


def deal(lengths: NDArray[np.int64], world_size: int, capacity: int) -> Assignment:
    """Assign sequences with these lengths [S], at most `capacity`, to microbatches of at most `capacity` slots."""
    order = longest_first(lengths)
    falling = lengths[order]
    dealt, tokens = _deal_level(falling, next_multiple(int(lengths.sum()), world_size * capacity) // capacity)
    if tokens.max() > capacity:
        packed = pack(falling, capacity)
        count = next_multiple(packed.count, world_size)
        dealt, tokens = _deal_level(falling, count)
        if tokens.max() > capacity:
            dealt, tokens = packed.row, _sums(packed.row, falling, count)
    if not _is_level(tokens):  # with one microbatch more, all may be shorter
        more, their_tokens = _deal_level(falling, len(tokens) + world_size)
        if len(their_tokens) * their_tokens.max() < len(tokens) * tokens.max():
            dealt, tokens = more, their_tokens
    microbatches = len(tokens) // world_size
    together = stable_argsort(dealt)  # by microbatch, and in it longest first
    before = np.cumsum(falling[together]) - falling[together]
    own_before = before - (np.cumsum(tokens) - tokens)[dealt[together]]
    bins, offset = np.empty_like(dealt), np.empty_like(dealt)
    bins[order], offset[order[together]] = dealt, own_before
    slots = min(capacity, round_up(max(1, int(tokens.max())), _SLOT_PARTS))
    microbatch, rank = np.divmod(bins, world_size)
    rows, widths = np.ones(microbatches, dtype=np.int64), np.full(microbatches, slots)
    return Assignment(rank, microbatch, np.zeros_like(rank), offset, rows, widths)


def _deal_level(falling: NDArray[np.int64], bins: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the bin [S] of each length, and the sum [bins] of the lengths in each bin."""
    dealt = _deal_in_rounds(falling, bins)
    if not _is_level(_sums(dealt, falling, bins)):
        dealt = _deal_to_emptiest(falling, bins)
    return dealt, _sums(dealt, falling, bins)


def _sums(dealt: NDArray[np.int64], lengths: NDArray[np.int64], bins: int) -> NDArray[np.int64]:
    return np.bincount(dealt, weights=lengths, minlength=bins).astype(np.int64)


def _is_level(tokens: NDArray[np.int64]) -> bool:
    """Return whether the fullest bin has hardly more tokens than the mean."""
    return bool(tokens.max() * len(tokens) * _SLOT_PARTS <= tokens.sum() * (_SLOT_PARTS + 1))


def _deal_in_rounds(falling: NDArray[np.int64], bins: int) -> NDArray[np.int64]:
    """Deal one length to each bin in each round. In the first rounds, the longest goes to the bin that has least;
    further rounds alternate between this order and its reverse.
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
    return dealt


def _deal_to_emptiest(falling: NDArray[np.int64], bins: int) -> NDArray[np.int64]:
    """Deal each length to the bin that has least (Graham 1969, "Bounds on multiprocessing timing anomalies"). Takes
    many times as long as rounds."""
    by_fullness = [(0, number) for number in range(bins)]  # a heap
    dealt = np.empty_like(falling)
    for place, length in enumerate(falling.tolist()):
        tokens, dealt[place] = by_fullness[0]
        heapq.heapreplace(by_fullness, (tokens + length, by_fullness[0][1]))
    return dealt
