"""Notices that a run has saved no checkpoint for too long."""

import time
from collections.abc import Callable

_HOUR = 3600.0


class CheckpointAlarm:
    """Is raised after `hours` without a new checkpoint, and again after as many."""

    def __init__(self, hours: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds = hours * _HOUR
        self._saved_step: int | None = None
        self._saved_at = clock()
        self._due = self._saved_at + self._seconds

    def check(self, saved_step: int | None) -> str | None:
        """The message to send now, if any. `saved_step`: of the newest checkpoint."""
        now = self._clock()
        if saved_step != self._saved_step:
            self._saved_step, self._saved_at = saved_step, now
            self._due = now + self._seconds
        if now < self._due:
            return None
        self._due = now + self._seconds
        newest = "there is none" if saved_step is None else f"the newest is of step {saved_step}"
        return f"no checkpoint was saved for {(now - self._saved_at) / _HOUR:.1f} hours; {newest}"
