"""The order of work on streams and the host, and races: uses of the same memory that nothing puts in an order.

Each worker, a stream or the host, has a vector clock (Mattern 1989, "Virtual time and global states of distributed
systems"): how much of the work of every worker is done before the next work of this one. Work on a stream begins after
what the host knows to be done when it launches it. Waiting for a stream or an event merges clocks. Two uses of memory,
of which at least one writes, have to be ordered by the clocks (as in ThreadSanitizer).
"""

import functools
import sys
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from simulated_gpu.memory import Access, Block

HOST = "the host"
_PASSED = (
    "/simulated_gpu/",
    "/torch/",
    "/contextlib.py",
    "/typing_extensions.py",
    "/deepspeed/accelerator/",
    "/nvtx.py",
)
COLLECTIVES = "the stream of collectives"  # NCCL's, for those that are asynchronous

Clock = dict[str, int]


class Timeline:
    def __init__(self) -> None:
        self.races: list[str] = []
        self.waits: list[str] = []  # of the host for the GPU, one entry per wait
        self.default_stream = Stream(self)
        self._clocks: defaultdict[str, Clock] = defaultdict(dict)
        self._threads = threading.local()
        self._lock = threading.RLock()

    @property
    def current_stream(self) -> "Stream":
        """Of this thread."""
        return getattr(self._threads, "stream", None) or self.default_stream

    @contextmanager
    def on(self, stream: "Stream | None") -> Iterator[None]:
        """Launch on this stream; None: on the current one. As `torch.cuda.stream`."""
        before = self.current_stream
        self._threads.stream = stream or before
        try:
            yield
        finally:
            self._threads.stream = before

    def launch(self, worker: str, what: str, read: Iterable[Block], written: Iterable[Block]) -> None:
        """Work on a stream that uses memory. The stream of collectives waits for the current one first."""
        with self._lock:
            clock = self._clocks[worker]
            if worker == COLLECTIVES:
                merge(clock, self._clocks[self.current_stream.name])
            merge(clock, self._clocks[HOST])
            self._use(worker, what, read, written)

    def use_on_host(self, what: str, read: Iterable[Block], written: Iterable[Block]) -> None:
        """Work of the host that uses pinned memory."""
        with self._lock:
            self._use(HOST, what, read, written)

    def _use(self, worker: str, what: str, read: Iterable[Block], written: Iterable[Block]) -> None:
        clock = self._clocks[worker]
        clock[worker] = clock.get(worker, 0) + 1
        access = Access(worker, clock[worker], f"{what} ({caller()})")
        for block in read:
            self._check(access, "reads", block.written, "writes")
            block.read[worker] = access
        for block in written:
            self._check(access, "writes", block.written, "writes")
            for other in block.read.values():
                self._check(access, "writes", other, "reads")
            block.read, block.written = {}, access

    def _check(self, access: Access, verb: str, other: Access | None, other_verb: str) -> None:
        if other is not None and self._clocks[access.worker].get(other.worker, 0) < other.time:
            race = f"{access.worker} {verb} in {access.what} what {other.worker} {other_verb} in {other.what}"
            if race not in self.races:
                self.races.append(race)

    def snapshot(self, worker: str) -> Clock:
        with self._lock:
            return dict(self._clocks[worker])

    def wait(self, worker: str, clock: Clock) -> None:
        """The next work of `worker` begins when all that `clock` counts is done, and the host's work before this."""
        with self._lock:
            merge(self._clocks[worker], clock)
            merge(self._clocks[worker], self._clocks[HOST])

    def wait_on_host(self, what: str, clock: Clock) -> None:
        """The host waits for the GPU."""
        with self._lock:
            self.waits.append(f"{what} ({caller()})")
            merge(self._clocks[HOST], clock)

    def synchronize(self, *_: Any) -> None:
        """As `torch.cuda.synchronize`."""
        everything: Clock = {}
        for worker in list(self._clocks):
            merge(everything, self.snapshot(worker))
        self.wait_on_host("torch.cuda.synchronize", everything)


class Stream:
    """As `torch.cuda.Stream`."""

    _count = 0

    def __init__(self, timeline: Timeline, *_: Any, **__: Any) -> None:
        self._timeline = timeline
        self.name = f"stream {Stream._count}"
        Stream._count += 1

    def wait_stream(self, other: "Stream") -> None:
        self._timeline.wait(self.name, self._timeline.snapshot(other.name))

    def wait_event(self, event: "Event") -> None:
        self._timeline.wait(self.name, event.clock)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event(self._timeline)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._timeline.wait_on_host("Stream.synchronize", self._timeline.snapshot(self.name))

    def query(self) -> bool:
        return True


class Event:
    """As `torch.cuda.Event`."""

    def __init__(self, timeline: Timeline, *_: Any, **__: Any) -> None:
        self._timeline = timeline
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = self._timeline.snapshot((stream or self._timeline.current_stream).name)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._timeline.current_stream).wait_event(self)

    def synchronize(self) -> None:
        self._timeline.wait_on_host("Event.synchronize", self.clock)

    def query(self) -> bool:
        """The host learns that the work before the event is done, without waiting."""
        self._timeline.wait(HOST, self.clock)
        return True

    def elapsed_time(self, _end: "Event") -> float:
        return 1.0


def merge(clock: Clock, other: Clock) -> None:
    for worker, time in other.items():
        if clock.get(worker, 0) < time:
            clock[worker] = time


def caller() -> str:
    """The innermost line of code that is not in `_PASSED`. (`traceback` would read the files.)"""
    frame: Any = sys._getframe(1)
    while frame.f_back is not None and _is_passed(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"


@functools.cache
def _is_passed(file: str) -> bool:
    return any(part in file for part in _PASSED)
