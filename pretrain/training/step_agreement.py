"""The agreement of all ranks in each step: the next batch's token counts, whether all ranks have their share of it,
requests to stop or save, how many ranks have finished their part of a save, and the time.

One all-reduce of whole numbers per step, in flight while the step is computed: by the GPUs where ranks have some
(`DeviceSums`), else over gloo. Requests take effect when that step ends. Decisions that depend on time use rank 0's
clock: the learning rate of a step under a time budget depends on when the step before it began.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from pretrain.batching.batch import RankBatch
from pretrain.batching.loader import DataWorkerError
from pretrain.engine.host_copy import HostCopy
from pretrain.training.cpu_group import CpuGroup
from pretrain.world import World


class TrainingClock:
    """Times a run over all its attempts, and since the last checkpoint."""

    def __init__(self, seconds_before: float) -> None:
        """`seconds_before`: of training in earlier attempts."""
        self._start = time.monotonic() - seconds_before
        self._saved = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds of training, over all attempts."""
        return time.monotonic() - self._start

    @property
    def minutes_since_save(self) -> float:
        return (time.monotonic() - self._saved) / 60

    def restart_save_timer(self) -> None:
        self._saved = time.monotonic()


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


class DeviceSums:
    """Sums whole numbers over all ranks by their GPUs, in place of `CpuGroup`.

    gloo sends such sums around a ring of all ranks, in 2 (N - 1) messages one after another: at 1,024 ranks that takes
    longer than a short step. NCCL adds them in a tree over its own network, and no host waits for another one.
    """

    def __init__(self, device: torch.device, on_progress: Callable[[], None]) -> None:
        """`on_progress`: called when sums are complete."""
        self._device = device
        self._on_progress = on_progress
        # Of its own, so that training's kernels do not wait for it. The group's collectives still run in the order of
        # their calls.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start_all_reduce_sum(self, numbers: Sequence[int]) -> Callable[[], list[int]]:
        """Start to sum each number over all ranks. Returns a function that waits for the sums, which are complete when
        the GPUs have finished the step before this one. Collective of the default group, in the order of its calls."""
        host = torch.tensor(numbers, dtype=torch.int64).pin_memory()
        with torch.cuda.stream(self._stream):
            sums = host.to(self._device, non_blocking=True)
            dist.all_reduce(sums)
            copy = HostCopy(sums)

        def wait_for_sums() -> list[int]:
            found = copy.wait()
            self._on_progress()
            return found

        return wait_for_sums


@dataclass(frozen=True)
class StepAgreement:
    """Begins the agreement of the ranks on each step."""

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
