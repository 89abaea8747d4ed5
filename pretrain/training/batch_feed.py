"""The batches of a run, each taken one step ahead, so that the ranks agree on it while they compute the one before.

Step k, in order:

    take            returns batch k and its totals; takes batch k + 1, and begins the agreement on it
                    the trainer queues batch k: forward, backward, update
    peek            on a GPU: returns batch k + 1, whose first microbatch the trainer queues before it reads the norm
    wait_for_votes  returns the agreement on batch k + 1, with the votes on step k: to stop, or to save, after it
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from experiment.run_files.goodput import DATA, ActivityTimer
from pretrain.batching.batch import RankBatch
from pretrain.batching.loader import BatchLoader, DataWorkerError
from pretrain.engine.phases import phase
from pretrain.training.background_save import BackgroundSave
from pretrain.training.cpu_group import CpuGroup
from pretrain.training.step_agreement import PendingTotals, StepAgreement, StepTotals
from pretrain.training.stop_request import StopRequest
from pretrain.training_stream import TrainingStream

# Timeout for a batch, as a fraction of `health.hang_seconds`: a rank whose data worker hangs reports it before it or
# the ranks that wait for it count as hung.
_DATA_TIMEOUT = 0.7


class _UpcomingBatch(NamedTuple):
    """A global batch that has not been trained on yet."""

    share: RankBatch | DataWorkerError | None  # this rank's, or why it has none; None: the stream has ended
    agreement: PendingTotals


@dataclass
class BatchFeed:
    """Gives the trainer one batch per step, while the ranks agree on the next one."""

    stream: TrainingStream
    device: torch.device  # that trains
    hang_seconds: float
    saves: BackgroundSave
    agreement: StepAgreement
    group: CpuGroup
    times: ActivityTimer

    def __post_init__(self) -> None:
        self._batches: Iterator[RankBatch] = iter(())
        self._upcoming: _UpcomingBatch | None = None

    def open(self, step: int, unused: Sequence[Tensor]) -> None:
        """Start the stream at a step, counted from 0. unused: this rank's tensors that the stream does not use."""
        on_gpu, timeout = self.device.type == "cuda", _DATA_TIMEOUT * self.hang_seconds
        workers = 2 if on_gpu else 1
        self._batches = BatchLoader(
            self.stream, step, self.stream.steps, workers, timeout=timeout, pin_memory=on_gpu, unused=unused
        )

    def close(self) -> None:
        """End the worker processes, and drop the batch that was taken ahead."""
        self._batches, self._upcoming = iter(()), None

    def take(self, stop: StopRequest) -> tuple[RankBatch, StepTotals]:
        """Take this rank's share of the next batch, and its totals; begins to agree on the batch after it.
        Collective. Raises DataWorkerError on all ranks if one has no share."""
        share, agreement = self._upcoming or self._take_ahead(stop)
        totals = agreement.wait()
        if totals.failed_batches:  # raised only now, so that the step before it is completed
            failure = str(share) if isinstance(share, DataWorkerError) else None
            raise DataWorkerError(self.group.first_message(failure, always_name_rank=True))
        assert isinstance(share, RankBatch), "the run ends with the stream"
        self._upcoming = self._take_ahead(stop)
        return share, totals

    def peek(self) -> tuple[RankBatch, StepTotals] | None:
        """Return the batch that `take` will return next, and its totals; None if the stream has ended or a rank has no
        share. Collective; call after the step is queued."""
        totals = self.wait_for_votes()
        assert self._upcoming is not None, "a batch was taken"
        share = self._upcoming.share
        return (share, totals) if isinstance(share, RankBatch) and not totals.failed_batches else None

    def wait_for_votes(self) -> StepTotals:
        """Return the agreement of the ranks that was made while the step was computed. Collective."""
        assert self._upcoming is not None, "a batch was taken"
        with phase("wait for ranks"):
            return self._upcoming.agreement.wait()

    def _take_ahead(self, stop: StopRequest) -> _UpcomingBatch:
        """Take a batch, if there is one, and begin to agree on it."""
        share: RankBatch | DataWorkerError | None
        with self.times.during(DATA, recorded=False), phase("data"):
            try:
                share = next(self._batches, None)
            except DataWorkerError as error:
                share = error
        stop_requested, part_done = stop.reason is not None, self.saves.is_part_done
        return _UpcomingBatch(share, self.agreement.begin(share, stop_requested, part_done))
