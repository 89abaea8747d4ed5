import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from pretrain.batching.batch import IGNORED, Microbatch, RankBatch
from pretrain.batching.loader import load_batches
from pretrain.batching.order import BatchSequences


def test_worker_processes_give_the_same_batches_and_seek(maker):
    """Catches prefetching that changes the order, and a loader that starts at the wrong step."""
    ahead = list(load_batches(maker, 5, 9, workers=2))
    assert [batch.step for batch in ahead] == [5, 6, 7, 8]
    for batch in ahead:
        for micro, expected in zip(batch.microbatches, maker[batch.step].microbatches, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(micro, expected, strict=True))


class ManyMicrobatches(Dataset):
    """Step -> a batch of 200 microbatches of different shapes."""

    def __getitem__(self, step: int) -> RankBatch:
        draw = np.random.default_rng(step)
        microbatches = [self._microbatch(draw) for _ in range(200)]
        origins = BatchSequences(*(np.arange(3) for _ in BatchSequences._fields))
        return RankBatch(step, microbatches, 5, 60, 3, 1200, [40, 20], origins, fingerprint=7)

    def _microbatch(self, draw: np.random.Generator) -> Microbatch:
        width, masked = int(draw.integers(3, 9)), int(draw.integers(1, 4))
        slots = torch.from_numpy(draw.integers(0, 1 << 40, (2, width)))
        return Microbatch(
            input_ids=slots,
            position_ids=slots + 1,
            segments=slots.to(torch.int32),
            cu_seqlens=torch.arange(width, dtype=torch.int32),
            masked_positions=torch.arange(masked),
            labels=torch.full((masked,), IGNORED),
        )


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_of_a_batch_changes_on_the_way(workers):
    """Catches tensors that get another value, type, shape or order when a batch is packed for the rank."""
    source = ManyMicrobatches()
    for step, batch in enumerate(load_batches(source, 0, 3, workers)):
        expected = source[step]
        assert batch._replace(microbatches=[], origins=None) == expected._replace(microbatches=[], origins=None)
        assert all(map(np.array_equal, batch.origins, expected.origins))
        assert len(batch.microbatches) == len(expected.microbatches)
        for ours, theirs in zip(batch.microbatches, expected.microbatches, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert (one.dtype, one.shape) == (other.dtype, other.shape)
                assert one.is_contiguous()
                assert torch.equal(one, other)


FEW_DESCRIPTORS = """
import resource
from test_loader import ManyMicrobatches
from pretrain.batching.loader import load_batches
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
kept = list(load_batches(ManyMicrobatches(), 0, 12, workers=2))
print([batch.step for batch in kept])
"""


def test_many_microbatches_take_few_file_descriptors(tmp_path):
    """Catches a descriptor for each tensor: at `ulimit -n 1024` a rank with 35 microbatches died or hung."""
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path}\n{FEW_DESCRIPTORS}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(list(range(12)))
