import time

import numpy as np
import pytest

from pretrain.batching.order import CorpusOrder, ShuffledOrder


def test_each_epoch_visits_every_sequence_once():
    """Catches lost and repeated sequences where batches straddle epochs and divide nothing."""
    order = ShuffledOrder(sequences=101, seed=1, batch_sequences=13)
    batches = [order.batch(step) for step in range(40)]
    epochs, ids = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    for epoch in range(4):
        assert np.array_equal(np.sort(ids[epochs == epoch]), np.arange(101))


def test_a_batch_does_not_depend_on_those_before():
    """Catches state: batch 7 asked for first is batch 7 asked for eighth."""
    one, other = (ShuffledOrder(sequences=101, seed=1, batch_sequences=13) for _ in range(2))
    for step in range(7):
        one.batch(step)
    assert np.array_equal(one.batch(7).ids, other.batch(7).ids)


@pytest.mark.parametrize(("epochs", "steps", "last"), [(1, 8, 10), (2, 16, 7), (0.5, 4, 11), (0.001, 1, 1)])
def test_an_epochs_run_ends_with_a_short_batch(epochs, steps, last):
    """Catches a last batch that wraps into the next epoch, or is dropped."""
    order = ShuffledOrder(sequences=101, seed=1, batch_sequences=13, epochs=epochs)
    assert order.steps == steps
    assert len(order.batch(steps - 1).ids) == last


def test_seeking_is_constant_time():
    """Catches skipping: batch 10^9 of a simulated corpus of 10^10 sequences takes milliseconds."""
    order = ShuffledOrder(sequences=10**10, seed=1, batch_sequences=4096)
    order.batch(0)
    began = time.perf_counter()
    batch = order.batch(10**9)
    assert time.perf_counter() - began < 0.1
    assert np.array_equal(np.unique(batch.epochs), [409])


def test_corpus_order_goes_front_to_back_once():
    """Catches an evaluation that shuffles, repeats or leaves out the tail."""
    order = CorpusOrder(sequences=10, batch_sequences=4)
    assert np.concatenate([order.batch(step).ids for step in range(order.steps)]).tolist() == list(range(10))
