"""Requests to stop early: a signal to any rank, or a STOP file in the run folder, which rank 0 checks for.

During training a rank finishes its step and `step_agreement` tells the others. Before, nothing can be lost, and a rank
ends at once.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Self

_CHECK_SECONDS = 0.5  # between checks for the file, which may be on a network disk
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def exit_on_signal(end_process: Callable[[str], object]) -> Iterator[None]:
    """Call `end_process` with the name of a signal, in a thread, until a `StopRequest` takes over.

    Not in the main thread, which may be blocked in C++, connecting or in a collective: Python's signal handlers do not
    run there, but the C handler writes to the descriptor of `set_wakeup_fd`. After `StopRequest`, signals are ignored.
    """
    received, wakeup = os.pipe()
    os.set_blocking(wakeup, False)

    def wait() -> None:
        while numbers := os.read(received, 1):  # empty: closed
            if numbers[0] in _SIGNALS:
                end_process(signal.Signals(numbers[0]).name)
        os.close(received)

    handlers = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    signal.set_wakeup_fd(wakeup)
    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(wakeup)


class StopRequest:
    """Whether this rank has been asked to stop. Catches signals from construction to `close`."""

    def __init__(self, stop_file: Path | None) -> None:
        """`stop_file`: checked for on the rank that passes it (rank 0)."""
        self._stop_file = stop_file
        self._checked = float("-inf")
        self._reason: str | None = None
        self._handlers = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        signal.set_wakeup_fd(-1)  # signals no longer end the process, see `exit_on_signal`

    @property
    def reason(self) -> str | None:
        """Why to stop, or None."""
        if self._reason is None and self._stop_file is not None and time.monotonic() - self._checked > _CHECK_SECONDS:
            self._checked = time.monotonic()
            if self._stop_file.exists():
                self._reason = f"found {self._stop_file}"
        return self._reason

    def close(self) -> None:
        """Restore the signal handlers."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._reason = f"signal {signal.Signals(number).name}"
