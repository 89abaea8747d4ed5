import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.batching.packing import deal, one_each, pack

LENGTHS = st.lists(st.integers(1, 32), min_size=1, max_size=200).map(np.array)


@given(LENGTHS)
def test_windows_hold_whole_sequences_side_by_side(lengths):
    """Catches overlapping sequences and sequences that stick out of a window."""
    windows = pack(lengths, 32)
    slots = np.zeros((windows.count, 32), dtype=int)
    for window, offset, length in zip(windows.window, windows.offset, lengths, strict=True):
        assert offset + length <= 32
        slots[window, offset : offset + length] += 1
    assert slots.max() == 1
    assert slots.any(axis=1).all(), "an empty window"


def test_windows_are_nearly_full():
    """Catches a packer that wastes slots: under 2 % empty for the lengths of a mixed corpus."""
    lengths = np.random.default_rng(0).integers(3, 129, 4096)
    assert lengths.sum() / (pack(lengths, 128).count * 128) > 0.98


@given(LENGTHS, st.sampled_from([1, 2, 3, 8, 1024]), st.integers(1, 20), st.booleans())
def test_every_sequence_is_dealt_to_one_place(lengths, world_size, max_rows, packed):
    """Catches sequences lost or computed twice at any world size, and ranks with unequal numbers of microbatches."""
    windows = pack(lengths, 32) if packed else one_each(lengths)
    dealing = deal(lengths, windows, world_size, max_rows)
    assert dealing.rows <= max_rows
    assert ((dealing.rank >= 0) & (dealing.rank < world_size)).all()
    assert ((dealing.microbatch >= 0) & (dealing.microbatch < dealing.microbatches)).all()
    assert ((dealing.row >= 0) & (dealing.row < dealing.rows)).all()
    places = set(zip(dealing.rank, dealing.microbatch, dealing.row, dealing.offset, strict=True))
    assert len(places) == len(lengths)
    for sequence, window in enumerate(windows.window):
        together = windows.window == window
        assert (dealing.rank[together] == dealing.rank[sequence]).all()
        assert (dealing.row[together] == dealing.row[sequence]).all()


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_get_equal_tokens(world_size):
    """Catches a dealing that makes one rank wait for another: within one window of each other."""
    lengths = np.random.default_rng(0).integers(3, 129, 4096)
    dealing = deal(lengths, pack(lengths, 128), world_size, 16)
    tokens = np.bincount(dealing.rank, weights=lengths, minlength=world_size)
    assert tokens.max() - tokens.min() <= 128 * 2


def test_few_shapes_occur():
    """Catches a row count that follows every batch: compiled kernels would be built again and again."""
    rng = np.random.default_rng(0)
    shapes = set()
    for _ in range(200):
        lengths = rng.integers(3, 129, 256)
        shapes.add(deal(lengths, pack(lengths, 128), 2, 64).rows)
    assert len(shapes) <= 4


@pytest.mark.parametrize("windows", range(30, 70))
def test_few_rows_are_empty(windows):
    """Catches microbatches whose rows are rounded up by a fifth where a batch just outgrows one of them."""
    dealing = deal(np.full(windows, 128), one_each(np.full(windows, 128)), 1, 32)
    assert dealing.rows * dealing.microbatches - windows <= 0.12 * windows
