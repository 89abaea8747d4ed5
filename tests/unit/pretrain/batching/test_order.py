import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.batching import counter_rng
from pretrain.batching.counter_rng import _network
from pretrain.batching.order import BatchSizes, CorpusStream, SequentialOrder, ShuffledOrder, quotas


def alone(sequences=101, batch_sequences=13, positions=None, **sizes):
    """The order of a single corpus."""
    return ShuffledOrder((CorpusStream(sequences, seed=1),), BatchSizes(batch_sequences, **sizes), positions)


def mixture(batch_sequences=64, warmup_steps=0):
    """Corpora of very different sizes, so that epochs are short in some and long in others."""
    streams = tuple(CorpusStream(count, seed) for seed, count in enumerate((101, 7, 5000)))
    return ShuffledOrder(streams, BatchSizes(batch_sequences, warmup_steps), shares=(5.0, 1.0, 2.5))


def joined(order, steps):
    return tuple(np.concatenate(parts) for parts in zip(*map(order.batch, steps), strict=True))


def test_each_epoch_visits_every_sequence_once():
    """Catches lost and repeated sequences where batches straddle epochs and no size divides another."""
    _, epochs, ids = joined(alone(), range(40))
    for epoch in range(4):
        assert np.array_equal(np.sort(ids[epochs == epoch]), np.arange(101))


def test_each_epoch_has_an_order_of_its_own():
    """Catches epochs in the same order, in which the same sequences share batches again and again."""
    _, epochs, ids = joined(alone(), range(40))
    neighbors = [set(pairwise(ids[epochs == epoch].tolist())) for epoch in range(4)]
    for one, other in pairwise(neighbors):
        assert len(one & other) < 10


@pytest.mark.parametrize("warmup", [0, 30])
def test_each_epoch_of_each_corpus_of_a_mixture_visits_every_sequence_once(warmup):
    """Catches corpora that lose, repeat or reorder sequences at the borders of blocks, batches and epochs."""
    corpora, epochs, ids = joined(mixture(64, warmup), range(200))
    for corpus, sequences in enumerate((101, 7, 5000)):
        own_epochs, own_ids = epochs[corpora == corpus], ids[corpora == corpus]
        expected_epochs, expected_ids = CorpusStream(sequences, corpus).at(range(len(own_ids)))
        assert np.array_equal(own_epochs, expected_epochs)
        assert np.array_equal(own_ids, expected_ids)
    assert epochs[corpora == 1].max() > 50


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6), st.integers(0, 10**15))
def test_quotas_keep_the_shares_and_never_decrease(shares, positions):
    """Catches counts that decrease, and shares that drift away from the weights."""
    before, after = quotas(shares, positions), quotas(shares, positions + 1024)
    assert before.sum() == positions
    assert (after >= before).all()
    exact = np.array(shares) / sum(shares) * positions
    assert (abs(before - exact) <= len(shares) + 1e-9 * positions).all()


def test_corpora_interleave():
    """Catches a mixture that is read corpus by corpus: each batch of 64 should have about the shares of the weights."""
    counts = np.array([np.bincount(mixture().batch(step).corpora, minlength=3) for step in range(100)])
    assert counts[:, 0].min() > 20
    assert counts[:, 2].max() < 40


def test_neighbouring_blocks_of_a_mixture_differ():
    """Catches a pattern of corpora that repeats throughout the run."""
    first, second = (mixture(1024).batch(step).corpora for step in range(2))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(("positions", "end", "last"), [(101, 8, 10), (202, 16, 7), (50, 4, 11), (1, 1, 1)])
def test_a_stream_that_ends_does_so_with_a_short_batch(positions, end, last):
    """Catches a last batch that wraps into the next epoch, or is dropped."""
    order = alone(positions=positions)
    assert order.end == end
    assert len(order.batch(end - 1).ids) == last


@pytest.mark.parametrize("order", [alone(10**10, 4096, warmup_steps=10**6), mixture(4096, 10**6)])
def test_seeking_is_constant_time(order, monkeypatch):
    """Catches seeking by iteration: batch 10^9 of a simulated corpus of 10^10 sequences costs no more than a batch."""
    sizes: list[int] = []
    starts: list[int] = []
    start_of = BatchSizes.start

    def counted_network(words, n, keys):
        mixed = _network(words, n, keys)
        sizes.append(mixed.size)
        return mixed

    def counted_start(self, step):
        starts.append(step)
        assert len(starts) < 10, "the start of a batch has a closed form"
        return start_of(self, step)

    monkeypatch.setattr(counter_rng, "_network", counted_network)
    monkeypatch.setattr(BatchSizes, "start", counted_start)
    tracemalloc.start()
    batch = order.batch(10**9)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 4096 <= sum(sizes) < 10 * 4096, "of the mixture, also the blocks that the batch touches"
    assert peak_bytes < 10_000_000
    assert len(batch.ids) == 4096
    if len(order.corpora) == 1:
        assert np.array_equal(np.unique(batch.epochs), [409])


def test_sequential_order_is_one_pass():
    """Catches an evaluation that shuffles, repeats or leaves out the tail."""
    order = SequentialOrder(sequences=10, batch_sequences=4)
    assert np.concatenate([order.batch(step).ids for step in range(order.steps)]).tolist() == list(range(10))


@given(st.integers(1, 300), st.integers(0, 60), st.integers(0, 80), st.integers(0, 1000))
def test_batches_grow_linearly(sequences, warmup, first_step, first_position):
    """Catches gaps, overlaps, empty batches and ones that are too large, wherever in the warmup a stage starts, and
    whatever was read before it."""
    sizes = BatchSizes(sequences, warmup, first_step, first_position)
    starts = [sizes.start(step) for step in range(first_step, first_step + 100)]
    assert starts[0] == first_position == sizes.start(0)
    for step, (start, after) in enumerate(pairwise(starts), first_step):
        grown = min(1.0, (step + 1) / (warmup + 1)) * sequences
        assert 1 <= after - start <= sequences
        assert abs(after - start - grown) <= 1
        if step >= warmup:
            assert after - start == sequences


@given(st.integers(1, 300), st.integers(0, 60), st.integers(0, 80), st.integers(0, 1000), st.integers(1, 10_000))
def test_the_end_is_the_first_step_that_reaches_all_positions(sequences, warmup, first_step, first_position, more):
    """Catches a run limited by epochs or tokens that is one batch too short or too long."""
    sizes, positions = BatchSizes(sequences, warmup, first_step, first_position), first_position + more
    end = sizes.end(positions)
    assert sizes.start(end - 1) < positions <= sizes.start(end)


def test_a_mistyped_length_has_an_end() -> None:
    """Catches an OverflowError instead of a plan that shows the mistake."""
    sizes = BatchSizes(8, warmup_steps=3)
    end = sizes.end(10**21)
    assert sizes.start(end - 1) < 10**21 <= sizes.start(end)
