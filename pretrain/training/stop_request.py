"""Requests to stop early: a signal to any rank, or a STOP file in the run folder, which rank 0 checks for.

`step_agreement` tells the other ranks.
"""

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Self

_CHECK_SECONDS = 0.5  # between checks for the file, which may be on a network disk


class StopRequest:
    """Whether this rank has been asked to stop. Catches signals from construction to `close`."""

    def __init__(self, stop_file: Path | None) -> None:
        """`stop_file`: checked for on the rank that passes it (rank 0)."""
        self._stop_file = stop_file
        self._checked = float("-inf")
        self._reason: str | None = None
        self._handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}

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
