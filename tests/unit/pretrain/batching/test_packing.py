import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.batching.packing import (
    MicrobatchLayout,
    assign,
    assign_to_ranks,
    deal,
    longest_first,
    one_per_row,
    pack,
    round_up,
)
from pretrain.batching.sequences import split_documents

LENGTHS = st.lists(st.integers(1, 32), min_size=1, max_size=200).map(np.array)


@given(LENGTHS)
def test_rows_hold_whole_sequences_side_by_side(lengths):
    """Catches overlapping sequences and sequences that stick out of a row."""
    packed_rows = pack(lengths, 32)
    slots = np.zeros((packed_rows.count, 32), dtype=int)
    for row, offset, length in zip(packed_rows.row, packed_rows.offset, lengths, strict=True):
        assert offset + length <= 32
        slots[row, offset : offset + length] += 1
    assert slots.max() == 1
    assert slots.any(axis=1).all(), "an empty row"


def best_fit_decreasing(lengths, width):
    """(row, offset) of each sequence; of equally free rows, the last to become so."""
    free, rows_by_age, places = [], [], {}
    for sequence in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        fitting = [row for row in rows_by_age if free[row] >= lengths[sequence]]
        if not fitting:
            free.append(width)
            fitting = [len(free) - 1]
            rows_by_age.append(fitting[0])
        row = min(reversed(fitting), key=lambda row: free[row])
        places[sequence] = row, width - free[row]
        free[row] -= lengths[sequence]
        rows_by_age.remove(row)
        rows_by_age.append(row)
    return [places[sequence] for sequence in range(len(lengths))]


@given(LENGTHS, st.integers(32, 70))
def test_rows_are_those_of_best_fit_decreasing(lengths, width):
    """Catches sequences in other rows than the best-fitting ones: the layout of a run would change."""
    packed_rows = pack(lengths, width)
    assert list(zip(packed_rows.row, packed_rows.offset, strict=True)) == best_fit_decreasing(lengths, width)


@pytest.mark.parametrize("longest", [100, 100_000])
def test_longest_first_is_stable(longest):
    """Catches lengths that overflow the integers they are sorted as, and equal lengths in another order."""
    lengths = np.random.default_rng(0).integers(1, longest, 3000)
    assert longest_first(lengths).tolist() == sorted(range(3000), key=lambda number: -lengths[number])


def test_rows_are_nearly_full():
    """Catches a packer that leaves 2 % of the slots or more empty for the lengths of a mixed corpus."""
    lengths = np.random.default_rng(0).integers(3, 129, 4096)
    assert lengths.sum() / (pack(lengths, 128).count * 128) > 0.98


@given(LENGTHS, st.sampled_from([1, 2, 3, 8, 1024]), st.integers(1, 20), st.booleans())
def test_every_sequence_is_assigned_one_place(lengths, world_size, max_rows, packed):
    """Catches sequences lost or computed twice at any world size, and ranks with unequal numbers of microbatches."""
    packed_rows = pack(lengths, 32) if packed else one_per_row(lengths)
    layout = MicrobatchLayout(32, 32 * max_rows, "packed" if packed else "padded")
    assignment = assign_to_ranks(lengths, packed_rows, world_size, layout)
    assert (assignment.rows * assignment.widths <= 32 * max_rows).all()
    assert (assignment.offset + lengths <= assignment.widths[assignment.microbatch]).all()
    assert ((assignment.rank >= 0) & (assignment.rank < world_size)).all()
    assert ((assignment.microbatch >= 0) & (assignment.microbatch < assignment.microbatches)).all()
    assert ((assignment.row >= 0) & (assignment.row < assignment.rows[assignment.microbatch])).all()
    places = set(zip(assignment.rank, assignment.microbatch, assignment.row, assignment.offset, strict=True))
    assert len(places) == len(lengths)
    for sequence, row in enumerate(packed_rows.row):
        together = packed_rows.row == row
        assert (assignment.rank[together] == assignment.rank[sequence]).all()
        assert (assignment.row[together] == assignment.row[sequence]).all()


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize(("rows", "difference"), [("packed", 128), ("padded", 24)])
def test_ranks_get_equal_tokens(world_size, rows, difference):
    """Catches an assignment that makes one rank wait for another: within one row of each other. Where rows are not
    equally full, a rank that gets the fullest one of each round would be far ahead."""
    lengths = np.random.default_rng(0).integers(3, 129, 4096)
    assignment = assign(lengths, world_size, MicrobatchLayout(128, 128 * 16, rows))
    tokens = np.bincount(assignment.rank, weights=lengths, minlength=world_size)
    assert tokens.max() - tokens.min() <= difference


@pytest.mark.parametrize("max_rows", [64, 512])
def test_few_shapes_occur(max_rows):
    """Catches a row count that varies from batch to batch, for which kernels would be recompiled."""
    rng = np.random.default_rng(0)
    shapes = set()
    for _ in range(200):
        lengths = rng.integers(3, 129, 256)
        shapes |= set(assign(lengths, 2, MicrobatchLayout(128, 128 * max_rows)).rows)
    assert len(shapes) <= 4


@pytest.mark.parametrize("least_width", [0, 128])
def test_padded_microbatches_are_as_wide_as_their_longest_sequence(least_width):
    """Catches microbatches of short sequences that are as wide as those of long ones, have as few rows, or have rows
    that take more memory than the widest ones, and ranks whose shapes differ."""
    lengths = np.clip(30 * np.exp(np.random.default_rng(0).normal(0, 0.8, 1024)), 3, 512).astype(np.int64)
    assignment = assign(lengths, 2, MicrobatchLayout(512, 8192, "padded", least_width=least_width))
    taken = np.maximum(assignment.widths, least_width) + 64
    full = 16 * (512 + 64)
    assert (assignment.rows * taken <= full).all()
    are_full = ((assignment.rows + 1) * taken > full)[:-1]
    assert (are_full | (2 * assignment.widths[1:] <= assignment.widths[:-1])).all(), "the rest would be mostly padding"
    longest = np.zeros(assignment.microbatches, dtype=np.int64)
    np.maximum.at(longest, assignment.microbatch, lengths)
    assert ((assignment.widths - longest >= 0) & (assignment.widths - longest < 16)).all()


@pytest.mark.parametrize(("longest", "microbatch_tokens"), [(512, 8192), (512, 1000), (128, 128)])
def test_rows_of_a_model_that_pads_them_keep_their_number(longest, microbatch_tokens):
    """Catches rows of Longformer that exceed the memory: it pads each to its attention window."""
    layout = MicrobatchLayout(longest, microbatch_tokens, "padded", least_width=512)
    assert {layout.padded_rows(width) for width in (16, 64, longest)} == {microbatch_tokens // longest}


@pytest.mark.parametrize("count", range(30, 70))
def test_few_rows_are_empty(count):
    """Catches rows rounded up by a fifth when a batch is slightly larger than one microbatch."""
    lengths = np.full(count, 128)
    assignment = assign(lengths, 1, MicrobatchLayout(128, 128 * 32))
    assert assignment.rows.sum() - count <= 0.12 * count
    rows = np.bincount(assignment.microbatch)
    assert rows.max() - rows.min() <= 1, "a second microbatch that is nearly empty"


@pytest.mark.parametrize("rows", ["padded", "packed"])
@pytest.mark.parametrize(("sequences", "world_size"), [(1024, 64), (16, 1), (1000, 8), (1, 4)])
def test_rows_of_a_batch_smaller_than_a_microbatch(rows, sequences, world_size):
    """Catches rows that are rounded up to a part of a microbatch that the batch cannot fill."""
    assignment = assign(np.full(sequences, 128), world_size, MicrobatchLayout(128, 128 * 2048, rows))
    assert assignment.microbatches == 1
    assert assignment.rows[0] <= -(-sequences // world_size) * 17 / 16


@pytest.mark.parametrize("max_rows", [16, 64, 256])
def test_few_rows_are_empty_if_many_sequences_share_one(max_rows):
    """Catches rows that are rounded up to a part of the sequences, of which a row holds many."""
    assignment = assign(np.full(256, 40), 1, MicrobatchLayout(512, 512 * max_rows))
    assert assignment.rows.sum() <= 22 + assignment.microbatches


@given(st.integers(0, 10**6), st.sampled_from([8, 32, 64]))
def test_counts_are_rounded_up_by_a_part_at_most(count, parts):
    """Catches counts rounded down, or by more than a part."""
    rounded = round_up(count, parts)
    assert count <= rounded <= count * (1 + 1 / parts)


@pytest.mark.parametrize("parts", [8, 32, 64])
def test_counts_are_rounded_to_few_values(parts):
    """Catches counts rounded to as many values as there are counts."""
    assert len({round_up(one, parts) for one in range(4096, 8193)}) <= 2 * parts + 1


def sequence_lengths(kind, count, width):
    """Lengths of `count` shuffled sequences of at most `width` tokens; document lengths are lognormal."""
    rng = np.random.default_rng(7)
    mean, deviation, documents = {
        "wiki": (4.4, 1.0, 80_000),  # paragraphs: most are much shorter than a sequence
        "web": (6.0, 1.1, 50_000),
        "books": (11.0, 0.5, 300),  # nearly all sequences are full
    }[kind]
    lengths = np.clip(np.exp(rng.normal(mean, deviation, documents)), 1, 300_000).astype(np.int64)
    return rng.choice(split_documents(lengths, width - 2) + 2, count, replace=False)


@given(
    st.lists(st.integers(1, 32), min_size=1, max_size=200).map(np.array),
    st.sampled_from([1, 2, 3, 8, 1024]),
    st.integers(32, 300),
)
def test_every_sequence_has_slots_of_its_own(lengths, world_size, capacity):
    """Catches sequences lost, overlapping or outside of the row, and microbatches larger than their capacity."""
    assignment = deal(lengths, world_size, capacity)
    (width,) = set(assignment.widths.tolist())
    assert width <= capacity
    assert (assignment.rows == 1).all()
    slots = np.zeros((world_size, assignment.microbatches, width), dtype=int)
    where = zip(assignment.rank, assignment.microbatch, assignment.offset, lengths, strict=True)
    for rank, microbatch, offset, length in where:
        assert offset + length <= width
        slots[rank, microbatch, offset : offset + length] += 1
    assert slots.max() == 1
    assert slots.sum() == lengths.sum()
    used = slots.sum(axis=-1, keepdims=True)
    assert np.array_equal(slots, np.arange(width) < used), "padding is at the end"


@pytest.mark.parametrize("kind", ["wiki", "web", "books"])
@pytest.mark.parametrize("width", [128, 512, 1024])
@pytest.mark.parametrize(("sequences", "world_size"), [(512, 1), (4096, 1), (4096, 8), (16384, 64)])
def test_nearly_all_slots_are_real_tokens(kind, width, sequences, world_size):
    """Catches a dealing that leaves 2 % of the slots or more to padding, or makes ranks wait for each other."""
    lengths = sequence_lengths(kind, sequences, width)
    assignment = deal(lengths, world_size, 65536)
    slots = world_size * assignment.bounds[-1]
    assert lengths.sum() / slots > 0.98
    tokens = np.bincount(assignment.rank, weights=lengths, minlength=world_size)
    assert tokens.min() > 0.98 * tokens.max()


@pytest.mark.parametrize(
    ("lengths", "world_size", "microbatches"),
    [
        ([8192] + [30] * 1023, 1, 5),
        ([8192] * 3 + [2000] * 40 + [30] * 1000, 4, 5),
        ([5000] * 8 + [3000] * 8, 1, 8),
        ([4100] * 7, 2, 4),
        ([4000, 2100, 2000] * 50, 1, 50),  # by best fit
        ([4096] * 4 + [30] * 12, 1, 4),  # of half the slots
    ],
)
def test_a_few_long_sequences_cost_no_microbatches(lengths, world_size, microbatches):
    """Catches short sequences that are dealt to microbatches which long ones fill already: all would have to be more
    until each holds no more than one. And fewer microbatches, but more slots."""
    assert deal(np.array(lengths), world_size, 8192).microbatches == microbatches


def test_a_long_row_is_not_padded_with_short_ones():
    """Catches short sequences that are computed as if they were as long as the longest of a batch."""
    layout = MicrobatchLayout(1024, 65536, "padded")
    assignment = assign(np.array([1024] + [30] * 1023), 8, layout)
    assert assignment.widths.tolist() == [1024, 32]
    assert assign(np.array([100] * 60 + [40] * 20), 1, layout).microbatches == 1
    assert assign(np.array([5, 1, 1, 1]), 1, layout).microbatches == 1


def test_equally_full_microbatches_keep_their_order():
    """Catches a sort that orders equal values differently on other processors: hosts would deal differently."""
    lengths = np.random.default_rng(0).integers(1, 6, 140 * 64)  # more rounds than are levelled
    assignment = deal(lengths, 8, -(-int(lengths.sum()) // 64) + 5)
    assert assignment.microbatches == 8
    tokens = [0] * 64
    later: list[int] = []
    for number, start in enumerate(range(0, len(lengths), 64)):
        emptiest = sorted(range(64), key=tokens.__getitem__)
        if number == 128:
            later = emptiest
        dealt = emptiest if number < 128 else later[:: (-1) ** number]
        for sequence, place in zip(longest_first(lengths)[start : start + 64], dealt, strict=True):
            assert (assignment.microbatch[sequence], assignment.rank[sequence]) == divmod(place, 8)
            tokens[place] += lengths[sequence]


def test_few_widths_of_flat_microbatches_occur():
    """Catches a number of slots that varies from batch to batch, for which kernels would be recompiled."""
    rng = np.random.default_rng(0)
    assert len({deal(rng.integers(3, 129, 4096), 2, 32768).widths[0] for _ in range(200)}) <= 6


def test_attention_is_balanced():
    """Catches a microbatch that gets all of the long sequences, whose attention costs most."""
    lengths = sequence_lengths("web", 4096, 512)
    assignment = deal(lengths, 8, 65536)
    bins = assignment.rank * assignment.microbatches + assignment.microbatch
    squares = np.bincount(bins, weights=lengths.astype(float) ** 2)
    assert squares.max() < 1.02 * squares.mean()
