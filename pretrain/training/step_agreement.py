"""The agreement of all ranks in each step: the next batch's token counts, whether all ranks have their share of it,
requests to stop or save, how many ranks have finished their part of a save, the time, and how long each rank has
worked.

One all-reduce of whole numbers per step, in flight while the step is computed: by the GPUs where ranks have some
(`device_sums`), else over gloo. Requests take effect when that step ends. Decisions that depend on time use rank 0's
clock: the learning rate of a step under a time budget depends on when the step before it began.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

from pretrain.batching.batch import RankBatch
from pretrain.batching.loader import DataWorkerError
from pretrain.training.cpu_group import CpuGroup, PendingSums
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
    work_microseconds: tuple[int, ...] = ()  # by rank, see `StepAgreement.begin`

    @property
    def seconds(self) -> float:
        return self.milliseconds / 1000

    def flatten(self) -> list[int]:
        """Return all numbers in one list, in the order of the fields."""
        return [number for value in self for number in (value if isinstance(value, tuple) else (value,))]

    def unflatten(self, numbers: Sequence[int]) -> "StepTotals":
        """Return the totals with fields as long as in `self` that flatten to `numbers`."""
        rest = iter(numbers)
        fields: dict[str, Any] = {
            name: tuple(islice(rest, len(value))) if isinstance(value, tuple) else next(rest)
            for name, value in self._asdict().items()
        }
        return StepTotals(**fields)


class StepAgreement:
    def __init__(
        self, sums: CpuGroup | DeviceSums, world: World, clock: TrainingClock, save_minutes: float | None, corpora: int
    ) -> None:
        """`save_minutes`: between checkpoints; None: none are due by the clock. `corpora`: of the mixture."""
        self._sums = sums
        self._world = world
        self._is_rank0 = world.rank == 0
        self._clock = clock
        self._save_minutes = save_minutes
        self._corpora = corpora

    def begin(
        self,
        share: RankBatch | DataWorkerError | None,
        stop_requested: bool,
        part_done: bool,
        work_seconds: float | None = None,
    ) -> "PendingTotals":
        """Collective; call before a step is computed.

        Args:
            share: of the global batch of the next step: this rank's, or why it has none; None: the stream ends.
            stop_requested: of this rank.
            part_done: whether this rank has done its part of a save in flight.
            work_seconds: how long this rank has worked without waiting for others since it last said so; 0: unknown.
                None on all ranks: not told.
        """
        save_due = self._save_minutes is not None and self._clock.minutes_since_save >= self._save_minutes
        batch = share if isinstance(share, RankBatch) else None
        work = [] if work_seconds is None else [0] * self._world.size
        if work_seconds is not None:
            work[self._world.rank] = int(work_seconds * 1e6)
        own = StepTotals(
            masked_tokens=batch.masked_tokens if batch else 0,
            tokens=batch.tokens if batch else 0,
            squared_lengths=batch.squared_lengths if batch else 0,
            failed_batches=int(isinstance(share, DataWorkerError)),
            stop_requests=int(stop_requested),
            save_requests=int(save_due and self._is_rank0),
            ranks_done=int(part_done),
            milliseconds=int(self._clock.seconds * 1000) if self._is_rank0 else 0,
            corpus_tokens=tuple(batch.corpus_tokens) if batch else (0,) * self._corpora,
            work_microseconds=tuple(work),
        )
        return PendingTotals(own, self._sums.start_all_reduce_sum(own.flatten()))


class PendingTotals:
    """An agreement that is in flight."""

    def __init__(self, own: StepTotals, sums: PendingSums) -> None:
        """`own`: this rank's part of the sums."""
        self._own = own
        self._sums = sums
        self._totals: StepTotals | None = None

    def wait(self) -> StepTotals:
        if self._totals is None:
            self._totals = self._own.unflatten(self._sums.wait())
        return self._totals
