"""Prefetch batches in worker processes.

A batch is a function of its step, so the loader maps steps to batches: torch's DataLoader provides ordering, prefetch
and dead-worker detection, and resuming at step k means starting at step k.
"""

import contextlib
import resource
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader, Dataset

from pretrain.batching.batch import RankBatch, pack_batch, unpack_batch

_GRACE_SECONDS = 40  # how long a worker keeps running after SIGTERM


def load_batches(
    batches: Dataset[RankBatch], first: int, last: int | None, workers: int, pin_memory: bool = False
) -> Iterator[RankBatch]:
    """Yield batches first, first + 1, … up to `last` (exclusive; None: endless), prefetched by `workers` processes.

    With `workers` = 0 each batch is made in this process when it is requested.
    """
    collate: Any = pack_batch  # called in the workers; with batch_size None it gets an item, not a list
    packed = DataLoader(
        batches,
        batch_size=None,
        sampler=_Steps(first, last),
        num_workers=workers,
        collate_fn=collate,
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_defer_sigterm,
    )
    return map(unpack_batch, packed)


def raise_limit_of_open_files() -> None:
    """Raise the soft limit, often 1024, to the hard limit: shared tensors and connections take file descriptors."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # some systems allow less than their hard limit says
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@dataclass(frozen=True)
class _Steps:
    """A DataLoader sampler that yields the step numbers."""

    first: int
    last: int | None

    def __iter__(self) -> Iterator[int]:
        step = self.first
        while self.last is None or step < self.last:
            yield step
            step += 1


def _defer_sigterm(_worker: int) -> None:
    """A launcher that stops a run signals the whole process tree, but the rank needs batches to finish its step."""
    signal.set_wakeup_fd(-1)  # the rank's own, which would take the signal for one to the rank
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _exit_after_grace)


def _exit_after_grace(_number: int, _frame: FrameType | None) -> None:
    signal.alarm(_GRACE_SECONDS)  # SIGALRM then ends the process
