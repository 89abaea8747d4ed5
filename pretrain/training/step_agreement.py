"""What all ranks agree on in each step: the next batch's token counts, whether all ranks have their share of it,
requests to stop or save, how many ranks have finished their part of a save, the time, and how long each rank has
worked.

One all-reduce of whole numbers per step over gloo, without a device sync. It is in flight while the step is computed,
because it takes up to 0.3 s at 1,024 ranks. Requests take effect when that step ends. Decisions that depend on time use
rank 0's clock: the learning rate of a step under a time budget depends on when the step before it began.
"""

from typing import NamedTuple

from pretrain.batching.batch import RankBatch
from pretrain.batching.loader import DataWorkerError
from pretrain.training.clock import TrainingClock
from pretrain.training.host_group import HostGroup, PendingSums
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


class StepAgreement:
    def __init__(
        self, hosts: HostGroup, world: World, clock: TrainingClock, save_minutes: float | None, corpora: int
    ) -> None:
        """`save_minutes`: between checkpoints; None: none are due by the clock. `corpora`: of the mixture."""
        self._hosts = hosts
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
            share: of the global batch after that of the step: this rank's, or why it has none; None: the stream ends.
            stop_requested: of this rank.
            part_done: whether this rank has done its part of a save in flight.
            work_seconds: how long this rank has worked without waiting for others since it last said so; 0: unknown.
                None on all ranks: not told.
        """
        save_due = self._save_minutes is not None and self._clock.minutes_since_save >= self._save_minutes
        counts, corpus_tokens = (0, 0, 0), [0] * self._corpora
        if isinstance(share, RankBatch):
            counts = share.masked_tokens, share.tokens, share.squared_lengths
            corpus_tokens = list(share.corpus_tokens)
        now = (
            int(isinstance(share, DataWorkerError)),
            int(stop_requested),
            int(save_due and self._is_rank0),
            int(part_done),
            int(self._clock.seconds * 1000) if self._is_rank0 else 0,
        )
        work = [] if work_seconds is None else [0] * self._world.size
        if work_seconds is not None:
            work[self._world.rank] = int(work_seconds * 1e6)
        sums = self._hosts.start_all_reduce_sum([*counts, *now, *corpus_tokens, *work])
        return PendingTotals(sums, self._corpora)


class PendingTotals:
    """An agreement that is in flight."""

    def __init__(self, sums: PendingSums, corpora: int) -> None:
        self._sums = sums
        self._corpora = corpora

    def wait(self) -> StepTotals:
        masked, tokens, squared, failed, stops, saves, done, milliseconds, *rest = self._sums.wait()
        by_corpus, by_rank = tuple(rest[: self._corpora]), tuple(rest[self._corpora :])
        return StepTotals(masked, tokens, squared, failed, stops, saves, done, milliseconds, by_corpus, by_rank)
