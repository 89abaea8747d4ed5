"""Prefetch batches in worker processes.

A batch is a function of its step, so worker n of W makes every W-th batch from the n-th on, and resuming at step k
means starting at step k. Each worker has a pipe, and a thread of the rank reads them in turn. Shared memory, which may
be small (64 MB in a Docker container), is not used, and a worker that dies or hangs is noticed.

Workers are always forked, however their rank was started: they need not import torch nor open the corpora again. A
worker has none of the rank's threads, and uses neither CUDA, collectives nor torch's thread pool.
"""

import contextlib
import ctypes
import itertools
import logging
import mmap
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor

from experiment.process.hardware import trim_memory
from experiment.process.signals import WARNING_SIGNALS
from pretrain.batching.batch import RankBatch, flatten_batch, unflatten_batch

log = logging.getLogger(__name__)

_GRACE_SECONDS = 40  # how long a worker keeps running after SIGTERM
_PREFETCHED = 4  # batches per worker that wait in the rank
_WAITS = 100  # in which a timeout is divided
_EXIT_SECONDS = 5.0  # a worker whose pipe is closed has exited by then
_START_SECONDS = 10.0
_START_ATTEMPTS = 5
_STARTED = b"started"  # the first message of a worker


# A batch; the text of a worker's error; an error of the rank itself; None where a worker has closed its pipe, because
# it is done or has died.
_Received = RankBatch | str | Exception | None


class Batches(Protocol):
    """Maps a step to this rank's batch of that step."""

    def __getitem__(self, step: int, /) -> RankBatch: ...


class DataWorkerError(Exception):
    """A data worker has died, hangs or has raised an error, or the rank cannot receive its batch; the message says
    which, and why."""


def _steps(first: int, last: int | None, stride: int = 1) -> Iterator[int]:
    return itertools.count(first, stride) if last is None else iter(range(first, last, stride))


class BatchLoader(Iterator[RankBatch]):
    """Yields batches that worker processes make. They end when it is deleted, or when the interpreter exits.

    Raises DataWorkerError instead of waiting for a worker that died, or longer than the timeout.
    """

    def __init__(
        self,
        batches: Batches,
        first: int,
        last: int | None,
        workers: int,
        *,
        timeout: float | None = None,
        pin_memory: bool = False,
        unused: Sequence[Tensor] = (),
    ) -> None:
        """Args:
        first, last: steps; the last is exclusive, None: endless.
        timeout: seconds to wait for a batch; None: no limit.
        pin_memory: of the current CUDA device.
        unused: tensors that `batches` does not use, see `_drop_memory`.
        """
        device = torch.cuda.current_device() if pin_memory else None
        self._steps = _steps(first, last)
        self._timeout = timeout
        workers_started: list[BaseProcess] = []
        closed = threading.Event()
        # Unlike weakref.finalize, runs before multiprocessing waits for the workers at exit, and in no forked process.
        self._end_workers = Finalize(self, _end_workers, (workers_started, closed), exitpriority=0)
        pipes = []
        for number in range(workers):
            worker, pipe = _start_worker(batches, _steps(first + number, last, workers), unused)
            workers_started.append(worker)
            pipes.append(pipe)
        self._turns = itertools.cycle(workers_started)
        self._ready: queue.Queue[_Received] = queue.Queue(_PREFETCHED * workers)
        threading.Thread(target=_receive_batches, args=(pipes, self._ready, closed, device), daemon=True).start()

    def __next__(self) -> RankBatch:
        step, worker = next(self._steps), next(self._turns)
        for _ in range(_WAITS):  # counted, so that a job that was suspended does not time out
            with contextlib.suppress(queue.Empty):
                batch = self._ready.get(timeout=self._timeout and self._timeout / _WAITS)
                break
        else:
            raise self._failure(worker, f"has not made the batch of step {step + 1} in {self._timeout:.0f} s")
        if isinstance(batch, Exception):
            self._end_workers()
            what = f"{type(batch).__name__}: {batch}"
            raise DataWorkerError(f"the batch of step {step + 1} cannot be received: {what}") from batch
        if batch is None:
            raise self._failure(worker, _describe_exit(worker))
        if isinstance(batch, str):
            raise self._failure(worker, f"failed at step {step + 1}: {batch}")
        return batch

    def _failure(self, worker: BaseProcess, what: str) -> DataWorkerError:
        self._end_workers()  # here too: a process that fails may exit without deleting this object
        return DataWorkerError(f"the data worker (pid {worker.pid}) {what}")


def _start_worker(batches: Batches, steps: Iterator[int], unused: Sequence[Tensor]) -> tuple[BaseProcess, Connection]:
    """Start a worker for these steps. Returns it and the pipe that it writes to.

    Before CPython 3.11.10 a forked process hangs if a thread that is not Python's own, such as one that ends a
    collective, was creating its thread state at that moment (github.com/python/cpython/issues/112275). A worker that
    does not report is replaced.
    """
    for attempt in range(1, _START_ATTEMPTS + 1):
        reader, writer = Pipe(duplex=False)
        arguments = batches, steps, unused, writer, reader
        worker = get_context("fork").Process(target=_make_batches, args=arguments, daemon=True)
        worker.start()
        writer.close()  # only the worker has it open: the pipe ends with the worker
        if reader.poll(_START_SECONDS) or attempt == _START_ATTEMPTS:
            break
        log.warning("data worker (pid %d) did not start within %.0f s: starting another", worker.pid, _START_SECONDS)
        worker.kill()
        worker.join()
        reader.close()
    return worker, reader


def _end_workers(workers: Sequence[BaseProcess], closed: threading.Event) -> None:
    closed.set()
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(_EXIT_SECONDS)


def _make_batches(
    batches: Batches, steps: Iterator[int], unused: Sequence[Tensor], writer: Connection, reader: Connection
) -> None:
    """Send the batches of a worker's steps, or the last line and traceback of an error, which ends it."""
    reader.close()  # else a worker would not notice that its rank has died
    _drop_memory(unused)
    _defer_signals()
    torch.set_num_threads(1)
    with contextlib.suppress(BrokenPipeError):
        writer.send_bytes(_STARTED)
        for step in steps:
            try:
                message = flatten_batch(batches[step])
            except Exception as error:
                writer.send(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
                return
            writer.send(message)


def _drop_memory(tensors: Sequence[Tensor]) -> None:
    """Drop this process's pages of tensors, whose values are then lost here, and of freed memory.

    Otherwise a forked process keeps each page that its parent overwrites: a worker would hold a copy of the weights and
    the optimizer states of its start.
    """
    libc, page = ctypes.CDLL(None), mmap.PAGESIZE
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu")
    for start, size in {storage.data_ptr(): storage.nbytes() for storage in storages}.items():
        first, end = -(-start // page) * page, (start + size) // page * page  # other pages hold other data too
        if first < end:
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)
    trim_memory()


def _receive_batches(
    pipes: Sequence[Connection], ready: "queue.Queue[_Received]", closed: threading.Event, device: int | None
) -> None:
    """Receive batches in a thread of the rank, until the first message that is not a batch."""
    for pipe in itertools.cycle(pipes):
        received = _receive(pipe, device)
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(received, timeout=1.0)
                break
        if closed.is_set() or not isinstance(received, RankBatch):
            break
    for pipe in pipes:
        pipe.close()


def _receive(pipe: Connection, device: int | None) -> _Received:
    """Return the message of a worker, pinned for `device`."""
    try:
        message = pipe.recv_bytes()
        if message == _STARTED:
            message = pipe.recv_bytes()
    except (EOFError, OSError):
        return None
    try:
        received = pickle.loads(message)
        if isinstance(received, str):
            return received
        data = torch.from_numpy(received.data)
        if device is not None:
            torch.cuda.set_device(device)
            data = data.pin_memory()
        return unflatten_batch(received, data)
    except Exception as error:
        return error


def _describe_exit(worker: BaseProcess) -> str:
    worker.join(_EXIT_SECONDS)
    code = worker.exitcode
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL), perhaps because the memory ran out"
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"exited with code {code}"


def _defer_signals() -> None:
    """Ignore stop signals: a launcher signals the whole process tree, but the rank needs batches to finish its step."""
    signal.set_wakeup_fd(-1)  # the rank's own, which would take the signal for one to the rank
    for number in (signal.SIGINT, *WARNING_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _exit_after_grace)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # which the rank has blocked


def _exit_after_grace(_number: int, _frame: FrameType | None) -> None:
    signal.alarm(_GRACE_SECONDS)  # SIGALRM then ends the process
