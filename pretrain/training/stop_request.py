"""Requests to stop early: a signal to any rank, or a STOP file in the run folder, which rank 0 checks for.

During training a rank finishes its step and `step_agreement` tells the others, in an evaluation `stop_votes`; a second
signal ends it at once. Before, nothing can be lost, and a rank ends within a second.

Only one thread of the rank receives these signals. The others block them, and with them all processes that they start,
such as compilers and W&B: a signal to all processes of a job must not end processes that the rank needs for its last
step.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from experiment.files import exists_uncached
from experiment.process.signals import STOP_SIGNALS, SignalHistory, signals_blocked

_CHECK_SECONDS = 0.5  # between checks for the file, which may be on a network disk


class StopRequest:
    """Whether this rank has been asked to stop. `receive_stop_requests` adds the requests."""

    def __init__(
        self,
        end_early: Callable[[str], object] = lambda _: None,
        end_at_once: Callable[[str], object] = lambda _: None,
    ) -> None:
        """Both are called with the reason, in a thread: `end_early` for a request before training, `end_at_once` for a
        second signal in training."""
        self._end_early = end_early
        self._end_at_once = end_at_once
        self._lock = threading.Lock()
        self._stop_file: Path | None = None
        self._checked = float("-inf")
        self._reason: str | None = None
        self.is_training = False

    def begin_training(self, stop_file: Path | None) -> None:
        """Let requests become the `reason`. `stop_file`: checked for on the rank that passes it (rank 0)."""
        with self._lock:
            self._stop_file, self.is_training = stop_file, True

    @property
    def reason(self) -> str | None:
        """The reason to stop training, or None."""
        if self._reason is None and self._stop_file is not None and time.monotonic() - self._checked > _CHECK_SECONDS:
            self._checked = time.monotonic()
            if _exists(self._stop_file):
                self._reason = f"found {self._stop_file}"
        return self._reason

    def add(self, reason: str, is_second: bool = False) -> None:
        """Add a request. `is_second`: it is a second signal."""
        with self._lock:
            if not self.is_training:
                self._end_early(reason)
            elif is_second:
                self._end_at_once(reason)
            else:
                self._reason = self._reason or reason

    def ignore_second(self) -> None:
        """Let a second signal change nothing: DeepSpeed's launcher sends SIGTERM when another rank has ended."""
        with self._lock:
            self._end_at_once = lambda _: None


@contextmanager
def receive_stop_requests(stop: StopRequest, early_file: Path | None) -> Iterator[None]:
    """Add to `stop`, in threads, the signals that this process receives, and the file if it is found before training.

    Not in the main thread, which may be blocked in C++, connecting or in a collective: Python's signal handlers do not
    run there, but the C handler writes to the descriptor of `set_wakeup_fd`.
    """
    received, wakeup = os.pipe()
    os.set_blocking(wakeup, False)

    def watch_signals() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        history = SignalHistory()
        with open(received, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] in STOP_SIGNALS:
                    is_second, name = history.is_second(number[0]), signal.Signals(number[0]).name
                    stop.add(f"a second signal, {name}" if is_second else f"signal {name}", is_second)

    def watch_file(path: Path) -> None:  # in a thread of its own: the disk may not answer
        while not ended.wait(_CHECK_SECONDS) and not stop.is_training:
            if _exists(path):
                stop.add(f"found {path}")

    ended = threading.Event()
    handlers = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
    signal.set_wakeup_fd(wakeup)
    try:
        with signals_blocked(STOP_SIGNALS):
            threading.Thread(target=watch_signals, name="stop signals", daemon=True).start()
            if early_file is not None:
                threading.Thread(target=watch_file, args=(early_file,), name="stop file", daemon=True).start()
            yield
    finally:
        ended.set()
        signal.set_wakeup_fd(-1)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(wakeup)


def _exists(stop_file: Path) -> bool:
    """Return whether the file exists; False while the disk does not answer."""
    with suppress(OSError):
        return exists_uncached(stop_file)
    return False
