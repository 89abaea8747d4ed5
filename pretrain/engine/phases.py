"""Parts of a training step: their names in profiles, and the time of this rank's forward passes."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch.profiler import record_function

Phase = Literal["data", "forward", "backward", "reduce gradients", "update weights", "wait for norm", "wait for ranks"]

PREFIX = "deepcloze: "


def phase(name: Phase) -> record_function:
    """Return a context whose time a profile counts as this part of the step. Costs a microsecond where nothing is
    profiled."""
    return record_function(PREFIX + name)


class ForwardTimer:
    """Times the forward passes of this rank, without waiting for a GPU.

    At ZeRO 0 to 2 a forward pass waits for no other rank, unlike a backward pass or a whole step: a rank whose forward
    passes take longer than on other ranks has a slower device or host. `enabled`: whether there are ranks to
    compare with; if not, it measures nothing.
    """

    def __init__(self, on_gpu: bool, ranks: int) -> None:
        """`ranks`: of the run, this one included."""
        self.enabled = ranks > 1
        self._on_gpu = on_gpu
        self._seconds = 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        if not self.enabled:
            yield
        elif self._on_gpu:
            start, end = _event(), _event()
            start.record()
            yield
            end.record()
            self._pending.append((start, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def take(self) -> float:
        """Return seconds since the last call. Unfinished work of a GPU counts at the next one."""
        while self._pending and self._pending[0][1].query():  # type: ignore[no-untyped-call]
            start, end = self._pending.popleft()
            self._seconds += start.elapsed_time(end) / 1000
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
