"""What all ranks agree on before each step: token counts, requests to stop or save, and the time.

One all-reduce of whole numbers per step over gloo, without a device sync. Decisions that depend on time use rank 0's
clock.
"""

from typing import NamedTuple

from pretrain.batching.batch import RankBatch
from pretrain.training.clock import TrainingClock
from pretrain.training.host_group import HostGroup
from pretrain.world import World


class StepTotals(NamedTuple):
    """The numbers of one step, over all ranks."""

    masked_tokens: int
    tokens: int  # real tokens, special tokens included
    squared_lengths: int  # sum over sequences
    stop_requests: int  # ranks that were asked to stop
    save_requests: int  # 1: a checkpoint is due by rank 0's clock
    milliseconds: int  # of training before this step, by rank 0's clock
    corpus_tokens: tuple[int, ...]  # real tokens by corpus

    @property
    def seconds(self) -> float:
        return self.milliseconds / 1000


class StepAgreement:
    def __init__(self, hosts: HostGroup, world: World, clock: TrainingClock, save_minutes: float | None) -> None:
        """`save_minutes`: between checkpoints; None: none are due by the clock."""
        self._hosts = hosts
        self._is_rank0 = world.rank == 0
        self._clock = clock
        self._save_minutes = save_minutes

    def all_reduce(self, batch: RankBatch, stop_requested: bool) -> StepTotals:
        """Collective. `batch`: this rank's share of the next global batch; `stop_requested`: of this rank."""
        save_due = self._save_minutes is not None and self._clock.minutes_since_save >= self._save_minutes
        own = (
            batch.masked_tokens,
            batch.tokens,
            batch.squared_lengths,
            int(stop_requested),
            int(save_due and self._is_rank0),
            int(self._clock.seconds * 1000) if self._is_rank0 else 0,
        )
        sums = self._hosts.all_reduce_sum([*own, *batch.corpus_tokens])
        masked, tokens, squared_lengths, stops, saves, milliseconds, *corpus_tokens = sums
        return StepTotals(masked, tokens, squared_lengths, stops, saves, milliseconds, tuple(corpus_tokens))
