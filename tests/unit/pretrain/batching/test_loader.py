import torch

from pretrain.batching.loader import load_batches


def test_worker_processes_give_the_same_batches_and_seek(maker):
    """Catches prefetching that changes the order, and a loader that starts at the wrong step."""
    ahead = list(load_batches(maker, 5, 9, workers=2))
    assert [batch.step for batch in ahead] == [5, 6, 7, 8]
    for batch in ahead:
        for micro, expected in zip(batch.microbatches, maker[batch.step].microbatches, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(micro, expected, strict=True))
