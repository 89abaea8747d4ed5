"""Write a checkpoint while training continues.

Training waits only for the copy of each rank's share to host memory. Two parts follow in a thread of each rank:

    1. every rank writes its share
    2. rank 0 writes everything else, gives the checkpoint its name and deletes old ones

A part ends when it has ended on all ranks. They agree on that along with a step (`step_agreement`), or wait for each
other. At most one save is in flight.

The thread has the lowest priority: it uses cores that training leaves idle. Most of its time is in calls that release
the GIL: writing, fsync, hashing. It uses the processor for some milliseconds per part of a file, and hardly at all
while it waits for a disk. That and the calls of fsync that return show whether a disk is slow or does not answer.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from experiment.errors import describe_disk_error
from experiment.files import call_after_syncs, fsync
from experiment.run_files.checkpoints import checkpoint_path
from experiment.run_files.goodput import CHECKPOINTING, ActivityTimer
from experiment.run_files.retention import Retention, apply_retention, discard, remove_leftovers
from experiment.run_files.run_folder import RunFolder
from pretrain.training.checkpoint_tensors import (
    Share,
    WriteModel,
    WrittenShare,
    complete_checkpoint,
    publish,
    write_share,
)
from pretrain.training.cpu_group import CpuGroup
from pretrain.training.mirror_uploads import MirrorUploads

log = logging.getLogger(__name__)

T = TypeVar("T")

_MOST_FAILURES = 3  # in a row
_OUTAGE_SECONDS = 900.0  # storage is often back in less
_NICENESS = 19
# A thread that has used less processor time than this since the last check, one second earlier, only waits: a write to
# a dead disk wakes up a few times a second, for 0.1 ms each.
_WORK_SECONDS = 0.001


class UnwritableError(Exception):
    """Checkpoints cannot be written; the message says on which ranks, and why."""


@dataclass(frozen=True)
class Snapshot:
    """The content of the checkpoint of a step, and a function that writes the model."""

    step: int
    share: Share  # of this rank
    state: dict[str, Any]  # of state.json
    write_model: WriteModel
    keep: Retention


class ThreadWork:
    """Whether a thread works or only waits for a disk."""

    def __init__(self, processor_seconds: Callable[[], float]) -> None:
        """`processor_seconds`: of the thread so far."""
        self._processor_seconds = processor_seconds
        self._syncs = 0
        self._seen = processor_seconds(), 0

    def count_sync(self) -> None:
        """Count a synced file: to write a small one takes hardly any processor time."""
        self._syncs += 1

    def has_worked(self) -> bool:
        """Return whether the thread has used the processor, or synced a file, since the last call of this method."""
        (seconds, syncs), self._seen = self._seen, (self._processor_seconds(), self._syncs)
        return self._seen[0] - seconds >= _WORK_SECONDS or self._seen[1] > syncs


def work_of_this_thread() -> ThreadWork:
    """Measure the calling thread, from now on."""
    clock = time.pthread_getcpuclockid(threading.get_ident())
    work = ThreadWork(lambda: time.clock_gettime(clock))
    call_after_syncs(work.count_sync)
    return work


@dataclass
class BackgroundSave:
    """The save in flight, if any. Building it deletes leftovers of interrupted saves; collective."""

    checkpoints: Path  # folder of the run
    group: CpuGroup
    times: ActivityTimer
    saved_step: int | None  # of the newest checkpoint of the run; None if it has none
    uploads: MirrorUploads | None = None  # to tell of new checkpoints, on rank 0

    def __post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint", _lower_priority)
        self._work = self._thread.submit(work_of_this_thread).result()
        self._snapshot: Snapshot | None = None  # in flight
        self._part: Future[Any] = Future()
        self._publishing = False  # in the second part
        self._failures = 0  # in a row
        self._failing_since = 0.0  # when the first of them was
        self.problem = ""  # of the last save, if any
        self.group.from_rank0(lambda: remove_leftovers(self.checkpoints))

    @property
    def is_part_done(self) -> bool:
        """Whether this rank has done its current part of the save in flight."""
        return self._snapshot is not None and self._part.done()

    def delete_superseded(self, keep: Retention) -> None:
        """Delete what the config does not keep, if it has changed, before a save needs the room. None may be in
        flight. Collective."""
        if (newest := self.saved_step) is not None:
            rank, kept = self.group.world.rank, self._on_disk(keep)
            with self.times.during(CHECKPOINTING):
                part = self._thread.submit(lambda: None if rank else apply_retention(self.checkpoints, kept, newest))
                self.group.wait_for_all(part, self._work.has_worked)  # after an error the next save tries again

    def begin(self, snapshot: Snapshot) -> None:
        """Begin to write a checkpoint; none may be in flight. Collective."""
        assert self._snapshot is None, "the save before it has ended"
        self._snapshot, self._publishing = snapshot, False
        self._part = self._thread.submit(write_share, snapshot.share, self._partial(snapshot.step))

    def advance_if_done(self, ranks_done: int) -> None:
        """Begin the next part, or end the save, if a part has ended on all ranks. Collective.

        Raises UnwritableError on all ranks after three failed saves in a row, the first one 15 minutes ago or more.
        """
        if self._snapshot is not None and ranks_done == self.group.world.size:
            with self.times.during(CHECKPOINTING, recorded=False):
                self._advance(self._snapshot)

    def wait(self) -> None:
        """Wait until the save in flight has ended, however slow the disk is. Collective; raises like `advance_if_done`.

        Raises TimeoutError if the disk of a rank does not answer for `health.hang_seconds`. Before that, deepcloze's
        launcher ends the ranks.
        """
        with self.times.during(CHECKPOINTING):
            while self._snapshot is not None:
                self.group.wait_for_all(self._part, self._work.has_worked)
                self._advance(self._snapshot)

    def _advance(self, snapshot: Snapshot) -> None:
        try:
            results = on_all_ranks(self.group, self._part.result)
        except UnwritableError as error:
            self._fail(snapshot.step, error)
            return
        if self._publishing:
            self._snapshot, self.saved_step, self._failures = None, snapshot.step, 0
            self.problem = results[0] or ""
            if self.problem:
                what = "checkpoints/best is not written, or old checkpoints are not deleted"
                log.warning("%s: %s; the next save tries again", what, self.problem)
        else:
            self._publishing = True
            self._part = self._thread.submit(self._publish, snapshot, results)

    def _publish(self, snapshot: Snapshot, shares: Sequence[WrittenShare]) -> str | None:
        """Write the rest of a checkpoint, on rank 0. Returns the problem of `publish`."""
        if self.group.world.rank != 0:
            return None
        run, partial = RunFolder(self.checkpoints.parent), self._partial(snapshot.step)
        complete_checkpoint(partial, shares, snapshot.state, snapshot.write_model)
        with suppress(OSError):  # a resumed run does not log the steps before a checkpoint again
            fsync(run.metrics)
        final, keep = checkpoint_path(self.checkpoints, snapshot.step), self._on_disk(snapshot.keep)
        problem = publish(partial, final, keep, before=self.saved_step)
        with suppress(OSError):
            run.saved.touch()
        if self.uploads is not None:
            self.uploads.update(snapshot.keep, snapshot.step)
        return problem

    def _on_disk(self, keep: Retention) -> Retention:
        return replace(keep, uploading=self.uploads.uploading) if self.uploads else keep

    def _fail(self, step: int, error: UnwritableError) -> None:
        """Leave nothing of the save behind, the disk may be full, and let training continue for a while."""
        partial = self._partial(step)
        if self.group.world.rank == 0 and os.path.lexists(partial):
            discard(partial)
        self._snapshot, self.problem = None, str(error)
        if self._failures == 0:
            self._failing_since = time.monotonic()
        self._failures += 1
        if self._failures >= _MOST_FAILURES and self.group.from_rank0(self._has_failed_for_long):
            raise error
        log.warning("the checkpoint of step %d cannot be written: %s; the next save tries again", step, error)

    def _has_failed_for_long(self) -> bool:
        return time.monotonic() - self._failing_since >= _OUTAGE_SECONDS

    def _partial(self, step: int) -> Path:
        return self.checkpoints / f".{checkpoint_path(self.checkpoints, step).name}.partial"


def on_all_ranks(group: CpuGroup, write: Callable[[], T]) -> list[T]:
    """Call `write` on every rank and return the results by rank. It fails on all ranks if it fails on one. Collective.

    Raises UnwritableError if writing failed. Any other error is raised on its rank, RuntimeError on the others.
    """
    result, raised, problem, unwritable = None, None, None, False
    try:
        result = write()
    except Exception as error:
        raised = error
        refusal = describe_disk_error(error)
        unwritable = refusal is not None or isinstance(error, OSError)
        problem = refusal or (str(error) if unwritable else f"{type(error).__name__}: {error}")
    gathered = group.all_gather_objects((problem, unwritable, result))
    if raised is not None and not unwritable:
        raise raised
    problems = [problem for problem, _, _ in gathered]
    if any(problems):
        all_unwritable = all(unwritable for problem, unwritable, _ in gathered if problem)
        raise (UnwritableError if all_unwritable else RuntimeError)(_join(problems)) from raised
    results: list[Any] = [result for _, _, result in gathered]
    return results


def _join(problems: Sequence[str | None]) -> str:
    """Return the problems of the ranks in one line; one that all of them have, once."""
    if len(set(problems)) == 1:
        return str(problems[0])
    return "; ".join(f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem)


def _lower_priority() -> None:
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)  # on Linux, of this thread alone
