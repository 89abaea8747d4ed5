"""Measure the throughput of training: tokens per second, and time spent waiting for data and checkpoints."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Lap:
    """Throughput of one logging interval."""

    seconds: float
    tokens_per_second: float
    data_wait: float  # fraction of the interval spent waiting for data
    checkpoint_seconds: float  # spent waiting for checkpoints, which are no part of `seconds`


class Throughput:
    """Counts tokens and waiting time between calls of `lap`. clock: monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started = clock()
        self._tokens = 0
        self._waited = 0.0
        self._saving = 0.0

    def add(self, tokens: int) -> None:
        """Count tokens trained on, without padding."""
        self._tokens += tokens

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        started = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside, which is not spent on training."""
        started = self._clock()
        try:
            yield
        finally:
            self._started += self._clock() - started

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Count the time inside as waiting for checkpoints, and exclude it like `paused`."""
        started = self._clock()
        try:
            with self.paused():
                yield
        finally:
            self._saving += self._clock() - started

    def lap(self) -> Lap:
        """The throughput since the last call. Starts the next interval."""
        now = self._clock()
        seconds = max(now - self._started, 1e-9)
        lap = Lap(seconds, self._tokens / seconds, min(self._waited / seconds, 1.0), self._saving)
        self._started, self._tokens, self._waited, self._saving = now, 0, 0.0, 0.0
        return lap
