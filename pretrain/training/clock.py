"""The clock of a run's training."""

import time


class TrainingClock:
    """Times a run over all its attempts, and since the last checkpoint."""

    def __init__(self, seconds_before: float) -> None:
        """`seconds_before`: of training in earlier attempts."""
        self._start = time.monotonic() - seconds_before
        self._saved = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds of training, over all attempts."""
        return time.monotonic() - self._start

    @property
    def minutes_since_save(self) -> float:
        return (time.monotonic() - self._saved) / 60

    def restart_save_timer(self) -> None:
        self._saved = time.monotonic()
