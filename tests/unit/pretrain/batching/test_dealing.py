import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.batching.dealing import deal
from pretrain.batching.sequences import split_documents


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
    assert assignment.width <= capacity
    assert assignment.rows == 1
    slots = np.zeros((world_size, assignment.microbatches, assignment.width), dtype=int)
    where = zip(assignment.rank, assignment.microbatch, assignment.offset, lengths, strict=True)
    for rank, microbatch, offset, length in where:
        assert offset + length <= assignment.width
        slots[rank, microbatch, offset : offset + length] += 1
    assert slots.max() == 1
    assert slots.sum() == lengths.sum()
    used = slots.sum(axis=-1, keepdims=True)
    assert np.array_equal(slots, np.arange(assignment.width) < used), "padding is at the end"


@pytest.mark.parametrize("kind", ["wiki", "web", "books"])
@pytest.mark.parametrize("width", [128, 512, 1024])
@pytest.mark.parametrize(("sequences", "world_size"), [(512, 1), (4096, 1), (4096, 8), (16384, 64)])
def test_nearly_all_slots_are_real_tokens(kind, width, sequences, world_size):
    """Catches a dealing that leaves 2 % of the slots or more to padding, or makes ranks wait for each other."""
    lengths = sequence_lengths(kind, sequences, width)
    assignment = deal(lengths, world_size, 65536)
    slots = world_size * assignment.microbatches * assignment.width
    assert lengths.sum() / slots > 0.98
    tokens = np.bincount(assignment.rank, weights=lengths, minlength=world_size)
    assert tokens.min() > 0.98 * tokens.max()


def test_few_shapes_occur():
    """Catches a number of slots that varies from batch to batch, for which kernels would be recompiled."""
    rng = np.random.default_rng(0)
    assert len({deal(rng.integers(3, 129, 4096), 2, 32768).width for _ in range(200)}) <= 6


def test_attention_is_balanced():
    """Catches a microbatch that gets all of the long sequences, whose attention costs most."""
    lengths = sequence_lengths("web", 4096, 512)
    assignment = deal(lengths, 8, 65536)
    bins = assignment.rank * assignment.microbatches + assignment.microbatch
    squares = np.bincount(bins, weights=lengths.astype(float) ** 2)
    assert squares.max() < 1.02 * squares.mean()
