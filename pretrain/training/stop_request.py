"""Wishes to stop early: a signal to any rank, or a STOP file in the run folder. All ranks decide together."""

import signal
import time
from pathlib import Path
from types import FrameType

_LOOK_EVERY = 0.5  # seconds between looks at the file: on a cluster it lies on a network disk


class StopRequest:
    """Whether this rank has been asked to stop. Signals are caught from construction to `close`."""

    def __init__(self, stop_file: Path | None) -> None:
        """`stop_file`: looked at by the rank that is given it (rank 0)."""
        self._stop_file = stop_file
        self._looked = float("-inf")
        self._reason: str | None = None
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}

    @property
    def reason(self) -> str | None:
        """Why to stop, or None."""
        if self._reason is None and self._stop_file is not None and time.monotonic() - self._looked > _LOOK_EVERY:
            self._looked = time.monotonic()
            if self._stop_file.exists():
                self._reason = f"{self._stop_file} is there"
        return self._reason

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._reason = f"signal {signal.Signals(number).name}"
