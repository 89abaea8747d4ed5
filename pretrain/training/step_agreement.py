"""The agreement of all ranks in each step: the next batch's token counts, whether all ranks have their share of it,
requests to stop or save, how many ranks have finished their part of a save, and the time.

One all-reduce of whole numbers per step, in flight while the step is computed: by the GPUs where ranks have some
(`device_sums`), else over gloo. Requests take effect when that step ends. Decisions that depend on time use rank 0's
clock: the learning rate of a step under a time budget depends on when the step before it began.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from pretrain.batching.batch import RankBatch
from pretrain.batching.loader import DataWorkerError
from pretrain.training.cpu_group import CpuGroup
from pretrain.training.device_sums import DeviceSums
from pretrain.training.training_progress import TrainingClock
from pretrain.world import World


class StepTotals(NamedTuple):
    """Numbers over all ranks: of a batch, and of the moment at which the agreement on them began."""

    masked_tokens: int
    tokens: int  # real tokens, special tokens included
    squared_lengths: int  # sum over sequences
    failed_batches: int  # ranks whose data worker has failed
    stop_requests: int  # ranks that were asked to stop
    save_requests: int  # 1: a checkpoint is due by rank 0's clock
    ranks_done: int  # ranks that have done their part of a save in flight
    milliseconds: int  # of training so far, by rank 0's clock
    corpus_tokens: tuple[int, ...]  # real tokens by corpus

    @property
    def seconds(self) -> float:
        return self.milliseconds / 1000


@dataclass(frozen=True)
class StepAgreement:
    sums: CpuGroup | DeviceSums
    world: World
    clock: TrainingClock
    save_minutes: float | None  # between checkpoints; None: none are due by the clock
    corpora: int  # of the mixture

    def begin(
        self, share: RankBatch | DataWorkerError | None, stop_requested: bool, part_done: bool
    ) -> "PendingTotals":
        """Collective; call before a step is computed.

        Args:
            share: of the global batch of the next step: this rank's, or why it has none; None: the stream ends.
            stop_requested: of this rank.
            part_done: whether this rank has done its part of a save in flight.
        """
        is_rank0 = self.world.rank == 0
        save_due = self.save_minutes is not None and self.clock.minutes_since_save >= self.save_minutes
        batch = share if isinstance(share, RankBatch) else None
        own = StepTotals(
            masked_tokens=batch.masked_tokens if batch else 0,
            tokens=batch.tokens if batch else 0,
            squared_lengths=batch.squared_lengths if batch else 0,
            failed_batches=int(isinstance(share, DataWorkerError)),
            stop_requests=int(stop_requested),
            save_requests=int(save_due and is_rank0),
            ranks_done=int(part_done),
            milliseconds=int(self.clock.seconds * 1000) if is_rank0 else 0,
            corpus_tokens=tuple(batch.corpus_tokens) if batch else (0,) * self.corpora,
        )
        *numbers, corpus_tokens = own
        return PendingTotals(self.sums.start_all_reduce_sum([*numbers, *corpus_tokens]))


class PendingTotals:
    """An agreement that is in flight."""

    def __init__(self, wait_for_sums: Callable[[], list[int]]) -> None:
        """`wait_for_sums`: returns the fields of `StepTotals` in order, the tokens of each corpus last."""
        self._wait_for_sums = wait_for_sums
        self._totals: StepTotals | None = None

    def wait(self) -> StepTotals:
        """Return the totals, when every rank has contributed."""
        if self._totals is None:
            sums, count = self._wait_for_sums(), len(StepTotals._fields) - 1
            self._totals = StepTotals._make([*sums[:count], tuple(sums[count:])])
        return self._totals
