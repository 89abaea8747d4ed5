import ctypes
import itertools
import multiprocessing
import os
import queue
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
import torch

from experiment.process.signals import STOP_SIGNALS, signals_blocked
from pretrain.batching import loader
from pretrain.batching.batch import IGNORED, Microbatch, RankBatch
from pretrain.batching.loader import BatchLoader, DataWorkerError
from pretrain.batching.order import BatchSequences
from rank_pool import RankPool
from waiting import LIMIT, wait_until


def test_worker_processes_give_the_same_batches_and_seek(maker):
    """Catches prefetching that changes the order, and a loader that starts at the wrong step."""
    ahead = list(BatchLoader(maker, 5, 9, workers=2))
    assert [batch.step for batch in ahead] == [5, 6, 7, 8]
    for batch in ahead:
        for micro, expected in zip(batch.microbatches, maker[batch.step].microbatches, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(micro, expected, strict=True))


class ManyMicrobatches:
    """Step -> a batch of 200 microbatches of different shapes."""

    def __getitem__(self, step: int) -> RankBatch:
        draw = np.random.default_rng(step)
        microbatches = [self._microbatch(draw) for _ in range(200)]
        origins = BatchSequences(*(np.arange(3) for _ in BatchSequences._fields))
        return RankBatch(step, microbatches, 5, 60, 1200, [40, 20], origins, fingerprint=7)

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


def test_nothing_of_a_batch_changes_on_the_way():
    """Catches tensors that get another value, type, shape or order when a batch is flattened for the rank."""
    source = ManyMicrobatches()
    for step, batch in enumerate(BatchLoader(source, 0, 3, workers=1)):
        expected = source[step]
        assert batch._replace(microbatches=[], origins=None) == expected._replace(microbatches=[], origins=None)
        assert all(map(np.array_equal, batch.origins, expected.origins))
        assert len(batch.microbatches) == len(expected.microbatches)
        for ours, theirs in zip(batch.microbatches, expected.microbatches, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert (one.dtype, one.shape) == (other.dtype, other.shape)
                assert one.is_contiguous()
                assert torch.equal(one, other)


def large_batch(step: int) -> RankBatch:
    """Of 1.5 MB, more than a pipe holds."""
    slots = torch.full((4, 8192), step)
    ones = torch.ones(4, 8192, dtype=torch.int32)
    microbatch = Microbatch(slots, slots, ones, torch.tensor([0, 4], dtype=torch.int32), slots[0], slots[1])
    origins = BatchSequences(*(np.arange(3) for _ in BatchSequences._fields))
    return RankBatch(step, [microbatch] * 2, 5, 60, 1200, [40, 20], origins, fingerprint=7)


class LargeBatches:
    """Step -> a large batch. At `bad_step` the worker signals itself, or raises an error if `number` is None."""

    def __init__(self, number: signal.Signals | None = None, bad_step: int | None = None) -> None:
        self.number, self.bad_step = number, bad_step

    def __getitem__(self, step: int) -> RankBatch:
        if step == self.bad_step:
            if self.number is None:
                raise ValueError("the corpus has changed")
            os.kill(os.getpid(), self.number)
        return large_batch(step)


@pytest.mark.parametrize(
    ("number", "timeout", "message"),
    [
        (signal.SIGKILL, None, r"was killed \(SIGKILL\), perhaps because the memory ran out"),
        (signal.SIGABRT, None, "was killed by SIGABRT"),  # not SIGHUP, which nohup ignores
        (signal.SIGSTOP, 2, "has not made the batch of step 6 in 2 s$"),
        (None, None, "failed at step 6: ValueError: the corpus has changed"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_or_hangs_is_named(workers, number, timeout, message):
    """Catches a rank that waits for its data forever, an error without the worker and the cause, and workers that are
    left over."""
    others = set(active_children())
    batches = BatchLoader(LargeBatches(number, bad_step=5), 3, None, workers)
    started = sorted(set(active_children()) - others, key=lambda worker: int(worker.name.rpartition("-")[2]))
    assert len(started) == workers
    assert [next(batches).step, next(batches).step] == [3, 4]
    if timeout is not None:  # not earlier: on a busy machine, batches may take longer
        wait_until(lambda: psutil.Process(started[0].pid).status() == psutil.STATUS_STOPPED)
        batches._timeout = timeout
    with pytest.raises(DataWorkerError, match=rf"\(pid {started[0].pid}\) {message}"):
        next(batches)
    assert set(active_children()) <= others


def test_a_suspended_job_has_not_timed_out():
    """Catches a worker that is blamed when a job continues: the wait that it was suspended in finds no batch."""
    batches = BatchLoader(LargeBatches(), 0, None, workers=1, timeout=LIMIT)
    get = Mock(side_effect=[queue.Empty, batches._ready.get()])
    batches._ready = Mock(get=get)
    assert next(batches).step == 0
    get.side_effect = queue.Empty
    get.reset_mock()
    with pytest.raises(DataWorkerError, match=f"has not made the batch of step 2 in {LIMIT:.0f} s"):
        next(batches)
    assert sum(call.kwargs["timeout"] for call in get.call_args_list) == pytest.approx(LIMIT)


def test_a_worker_killed_within_a_batch_is_named():
    """Catches a rank that waits for the rest of a batch, of which it has read the beginning."""
    others = set(active_children())
    batches = BatchLoader(LargeBatches(), 0, None, workers=1)
    (worker,) = set(active_children()) - others
    assert next(batches).step == 0
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataWorkerError, match=rf"\(pid {worker.pid}\) was killed \(SIGKILL\)"):
        list(batches)


def load_and_signal() -> tuple[Iterator[RankBatch], BaseProcess]:
    """Batches, and their worker, which has got all signals that stop a run."""
    others = set(active_children())
    of_pytest = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with signals_blocked(STOP_SIGNALS):  # as a rank does
        batches = BatchLoader(LargeBatches(), 0, None, workers=1)
    signal.signal(signal.SIGALRM, of_pytest)
    (worker,) = set(active_children()) - others
    for number in STOP_SIGNALS:
        os.kill(worker.pid, number)
    return batches, worker


def test_signals_to_all_processes_leave_a_worker_for_the_last_step():
    """Catches a worker that dies before its rank has finished a step."""
    batches, _ = load_and_signal()
    assert next(batches).step == 0


def test_a_worker_ends_some_time_after_a_signal(monkeypatch):
    """Catches a worker that stays when its rank cannot end."""
    monkeypatch.setattr(loader, "_GRACE_SECONDS", 1)
    _batches, worker = load_and_signal()
    worker.join(LIMIT)
    assert worker.exitcode == -signal.SIGALRM


def out_of_memory(*_: object) -> None:
    raise MemoryError("no pinned memory")


class Unreadable:
    """Can be pickled, but not unpickled."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return out_of_memory, ()


class UnreadableBatches:
    def __getitem__(self, step: int) -> RankBatch:
        return large_batch(step)._replace(origins=Unreadable())


@pytest.mark.parametrize("failing", ["set_device", "pin_memory", "unpickling"])
def test_a_rank_that_cannot_receive_a_batch_blames_no_worker(failing, monkeypatch):
    """Catches a rank that waits for a batch which it has failed to receive, and then names an innocent worker."""
    others = set(active_children())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", out_of_memory if failing == "set_device" else lambda _: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", out_of_memory)
    source = UnreadableBatches() if failing == "unpickling" else LargeBatches()
    batches = BatchLoader(source, 0, None, workers=2, timeout=LIMIT, pin_memory=failing != "unpickling")
    with pytest.raises(DataWorkerError, match="the batch of step 1 cannot be received: MemoryError: no pinned memory"):
        next(batches)
    assert set(active_children()) <= others


def test_workers_end_with_the_loader():
    """Catches worker processes that outlive a rewind."""
    others = set(active_children())
    batches = BatchLoader(LargeBatches(), 0, None, workers=2)
    assert len(set(active_children()) - others) == 2
    del batches
    assert set(active_children()) <= others


class Edges:
    """Step -> a large batch, as long as the bytes on both sides of a tensor are still there."""

    def __init__(self) -> None:
        self._bytes = np.full((1 << 26) + 200, 7, dtype=np.uint8)
        self.tensor = torch.from_numpy(self._bytes[100:-100])

    def __getitem__(self, step: int) -> RankBatch:
        assert self._bytes[:100].tolist() == self._bytes[-100:].tolist() == [7] * 100
        return large_batch(step)


def test_workers_keep_no_pages_of_unused_tensors():
    """Catches workers that hold the weights as they were at their start, and ones that lose what is beside a tensor."""
    others, source = set(active_children()), Edges()
    batches = BatchLoader(source, 0, None, workers=1, unused=[source.tensor])
    (worker,) = set(active_children()) - others
    assert next(batches).step == 0

    def own_memory() -> int:
        lines = Path(f"/proc/{worker.pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty:"))

    before = own_memory()
    assert (source.tensor == 7).all()
    source.tensor.add_(1)
    assert own_memory() - before < source.tensor.nbytes / 4


def test_a_worker_that_hangs_at_its_start_is_replaced(tmp_path, monkeypatch, caplog):
    """Catches a run that waits for its first batch until the timeout because a fork met a lock of CPython."""
    make_batches = loader._make_batches

    def hang_once(*arguments):
        if not (tmp_path / "hung").exists():
            (tmp_path / "hung").touch()
            time.sleep(3600)
        make_batches(*arguments)

    monkeypatch.setattr(loader, "_make_batches", hang_once)
    monkeypatch.setattr(loader, "_START_SECONDS", 1.0)
    batches = BatchLoader(ManyMicrobatches(), 0, 3, workers=2)
    assert len(list(itertools.islice(batches, 3))) == 3
    assert "did not start within 1 s: starting another" in caplog.text


def test_workers_end_when_one_cannot_start(monkeypatch):
    """Catches workers that are left over, and an error that hides the first one, where a process cannot be forked."""
    others, started = set(active_children()), []
    start = BaseProcess.start

    def start_once(worker):
        if started:
            raise BlockingIOError("no more processes")
        start(worker)
        started.append(worker)

    monkeypatch.setattr(BaseProcess, "start", start_once)
    with pytest.raises(BlockingIOError, match="no more processes"):
        BatchLoader(LargeBatches(), 0, None, workers=2)
    assert len(started) == 1
    assert set(active_children()) <= others


def test_workers_end_with_the_rank(tmp_path):
    """Catches worker processes that outlive a rank that was killed."""
    others = set(active_children())
    rank = os.fork()
    if rank == 0:
        try:
            kept = BatchLoader(LargeBatches(), 0, None, workers=2)
            pids = [str(worker.pid) for worker in set(active_children()) - others]
            (tmp_path / "partial").write_text(" ".join(pids))
            (tmp_path / "partial").rename(tmp_path / "pids")
            signal.pause()
            del kept
        finally:
            os._exit(1)
    try:
        wait_until((tmp_path / "pids").exists)
    finally:
        os.kill(rank, signal.SIGKILL)
        os.waitpid(rank, 0)
    pids = (tmp_path / "pids").read_text().split()
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}/exe") for pid in pids))  # noqa: PTH110 - zombies have none


EXIT = """
import tempfile
folder = tempfile.TemporaryDirectory()  # the first weakref.finalize fixes when all of them run
from test_loader import LargeBatches
from pretrain.batching.loader import BatchLoader
batches = BatchLoader(LargeBatches(), 0, None, workers=2)
print(next(batches).step)
"""


def test_a_process_with_workers_exits_quietly():
    """Catches "Exception ignored" at the exit of the interpreter, and an exit that waits for the workers."""
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path}\n{EXIT}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def started_as_case(_, method):
    """The type of the workers of a process that has been started by this method."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    others = set(active_children())
    kept = BatchLoader(LargeBatches(), 0, 2, workers=1)
    multiprocessing.set_start_method(before, force=True)
    found = {type(child).__name__ for child in set(active_children()) - others}
    del kept
    return found


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_are_forked_whatever_the_rank_was(pools, method):
    """Catches workers that are started as their rank was, which the tests of GPUs do in another way than a launch."""
    assert pools[1].run(started_as_case, method) == [{"ForkProcess"}]


def small_shared_memory_case(_):
    """The steps of batches where /dev/shm has 64 KB; None if it cannot be mounted. Changes what the process sees."""
    mount = "mount --make-rprivate / && mount -t tmpfs -o size=64k tmpfs /dev/shm"
    clone_newns = 0x20000  # os.CLONE_NEWNS of Python 3.12
    if ctypes.CDLL(None).unshare(clone_newns) or subprocess.run(["sh", "-c", mount], capture_output=True).returncode:
        return None
    size = os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize
    assert size <= 1 << 16, f"/dev/shm has {size} bytes"
    return [batch.step for batch in BatchLoader(LargeBatches(), 0, 5, workers=2, timeout=500)]


def few_descriptors_case(_):
    """The steps of batches, all of which are kept, with the limit of `ulimit -n 64`. Changes the process."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    kept = list(BatchLoader(ManyMicrobatches(), 0, 12, workers=2))
    return [batch.step for batch in kept]


def run_in_new_process(case, fork_server):
    pool = RankPool(fork_server, 1)
    (found,) = pool.run(case)
    pool.kill()
    return found


def test_batches_need_no_shared_memory(fork_server):
    """Catches a worker that cannot send its batch, and a rank that waits for it, where /dev/shm is small."""
    found = run_in_new_process(small_shared_memory_case, fork_server)
    if found is None:
        pytest.skip("cannot mount in a namespace of its own")
    assert found == list(range(5))


def test_many_microbatches_take_few_file_descriptors(fork_server):
    """Catches a descriptor for each tensor: at `ulimit -n 1024` a rank with 35 microbatches died or hung."""
    assert run_in_new_process(few_descriptors_case, fork_server) == list(range(12))
