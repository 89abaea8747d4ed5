"""Requests to stop early: a signal to any rank, or a STOP file in the run folder, which rank 0 checks for.

During training a rank finishes its step and `step_agreement` tells the others, in an evaluation `stop_votes`; a second
signal ends it at once. Before, nothing can be lost, and a rank ends within a second.

Only one thread of the rank receives these signals. The others block them, and with them all processes that they start,
such as compilers and W&B: a signal to all processes of a job must not end processes that the rank needs for its last
step.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Self

from experiment.files import exists_uncached
from experiment.process.signals import STOP_SIGNALS, SignalHistory, signals_blocked

_CHECK_SECONDS = 0.5  # between checks for the file, which may be on a network disk
_TAKEN_OVER = b"\0"  # in the pipe: no signal has this number


@contextmanager
def exit_on_stop_request(end_process: Callable[[str], object], stop_file: Path | None) -> Iterator[None]:
    """Call `end_process` with the reason, in a thread, on a signal or STOP file until a `StopRequest` takes over.

    Not in the main thread, which may be blocked in C++, connecting or in a collective: Python's signal handlers do not
    run there, but the C handler writes to the descriptor of `set_wakeup_fd`. After `StopRequest`, signals are ignored.
    """
    received, wakeup = os.pipe()
    os.set_blocking(wakeup, False)

    def watch() -> None:
        _receive_signals()
        with open(received, "rb", buffering=0):
            if reason := _wait_for_request(received, stop_file):
                end_process(reason)

    handlers = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
    signal.set_wakeup_fd(wakeup)
    try:
        with signals_blocked(STOP_SIGNALS):
            threading.Thread(target=watch, name="stop request", daemon=True).start()
            yield
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(wakeup)


def _receive_signals() -> None:
    """Let the thread that calls this receive signals that ask to stop: all others block them."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _wait_for_request(received: int, stop_file: Path | None) -> str | None:
    """Wait for a reason to stop; None if the pipe is closed, or training takes over."""
    while True:
        # Before the look at the pipe: a slow network disk may answer when training has begun.
        found = stop_file is not None and _exists(stop_file)
        if select.select([received], [], [], 0 if found else _CHECK_SECONDS)[0]:
            number = os.read(received, 1)
            if number in (b"", _TAKEN_OVER):
                return None
            if number[0] in STOP_SIGNALS:
                return signal.Signals(number[0]).name
        elif found:
            return f"found {stop_file}"


def _exists(stop_file: Path) -> bool:
    """Return whether the file exists; False while the disk does not answer."""
    with suppress(OSError):
        return exists_uncached(stop_file)
    return False


class StopRequest:
    """Whether this rank has been asked to stop. Catches signals from construction to `close`.

    A thread waits for a second signal: the main thread may be blocked in C++.
    """

    def __init__(self, stop_file: Path | None, end_process: Callable[[str], object] = lambda _: None) -> None:
        """Args:
        stop_file: checked for on the rank that passes it (rank 0).
        end_process: called with the reason, in a thread, on a second signal.
        """
        self._stop_file = stop_file
        self._checked = float("-inf")
        self._reason: str | None = None
        self._handlers = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        received, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        before = signal.set_wakeup_fd(self._wakeup)
        if before != -1:  # requests no longer end the process, see `exit_on_stop_request`
            os.write(before, _TAKEN_OVER)
        self._awaits_second = True
        threading.Thread(
            target=_wait_for_second, args=(received, end_process), name="second signal", daemon=True
        ).start()

    @property
    def reason(self) -> str | None:
        """The reason to stop, or None."""
        if self._reason is None and self._stop_file is not None and time.monotonic() - self._checked > _CHECK_SECONDS:
            self._checked = time.monotonic()
            if _exists(self._stop_file):
                self._reason = f"found {self._stop_file}"
        return self._reason

    def ignore_second(self) -> None:
        """Let a second signal change nothing: DeepSpeed's launcher sends SIGTERM when another rank has ended."""
        if self._awaits_second:
            self._awaits_second = False
            signal.set_wakeup_fd(-1)
            os.write(self._wakeup, _TAKEN_OVER)  # data workers hold the pipe open, too
            os.close(self._wakeup)

    def close(self) -> None:
        """Restore the signal handlers."""
        self.ignore_second()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._reason = self._reason or f"signal {signal.Signals(number).name}"


def _wait_for_second(received: int, end_process: Callable[[str], object]) -> None:
    _receive_signals()
    history = SignalHistory()
    with open(received, "rb", buffering=0) as pipe:
        while (number := pipe.read(1)) not in (b"", _TAKEN_OVER):
            if number[0] in STOP_SIGNALS and history.is_second(number[0]):
                end_process(f"a second signal, {signal.Signals(number[0]).name}")
