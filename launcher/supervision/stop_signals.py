"""Turns signals to the launcher into a STOP file, for which the training loop checks."""

import errno
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from experiment.disk_errors import describe_disk_error
from experiment.run_folder import RunFolder
from launcher.messages import notify
from launcher.signal_handlers import handle_stop_signals

# A second Ctrl-C within this time is the first one again: `timeout` and some wrappers deliver it twice.
_REPEATED_SIGNAL_SECONDS = 1.0
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class StopSignals:
    """Requests to stop the ranks of a launch. `kill`: kills those that run now; set while there are any."""

    def __init__(self, folder: RunFolder) -> None:
        self.kill: Callable[[], None] = lambda: None
        self.killed = False
        self.abandoned = False
        self._file = folder.stop
        self._requested_at: float | None = None  # time.monotonic() of the first signal
        self._created = False

    @property
    def requested(self) -> bool:
        return self.killed or self._requested_at is not None

    def wait(self, seconds: float) -> None:
        """Wait, but not after a request."""
        deadline = time.monotonic() + seconds
        while not self.requested and time.monotonic() < deadline:
            time.sleep(0.1)

    def kill_ranks(self, reason: str = "") -> None:
        """Kill the ranks at once. They can resume from the last complete checkpoint."""
        if reason:
            notify(f"killing the ranks: {reason}")
        self.killed = True
        self.kill()

    def abandon(self, reason: str) -> None:
        """Kill the ranks, and leave the run folder to another launch."""
        self.abandoned = True
        self.kill_ranks(reason)

    @contextmanager
    def handle(self) -> Iterator[None]:
        """Create RUN/STOP on the first signal; kill the ranks on a later Ctrl-C, or at once if the disk is full.

        The STOP file is removed on exit.
        """
        try:
            with handle_stop_signals(self._on_signal):
                yield
        finally:
            if self._created:
                with suppress(OSError):  # the next launch removes it
                    self._file.unlink(missing_ok=True)

    def _on_signal(self, number: int) -> None:
        if self._requested_at is None:
            self._requested_at = time.monotonic()
            try:
                self._file.touch()
            except OSError as error:
                reason = describe_disk_error(error) or error
                if error.errno in _UNWRITABLE:  # no checkpoint can be saved either
                    self.kill_ranks(str(reason))
                else:
                    self._requested_at = None
                    notify(f"cannot create STOP: {reason}; send the signal again")
            else:
                self._created = True
                notify("stopping: the ranks save a checkpoint and exit; press Ctrl-C again to kill them")
        elif number == signal.SIGINT and time.monotonic() - self._requested_at > _REPEATED_SIGNAL_SECONDS:
            self.kill_ranks()
