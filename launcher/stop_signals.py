"""Turns signals to the launcher into a STOP file, for which the training loop checks."""

import errno
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from experiment.disk_errors import describe_disk_error
from experiment.run_folder import RunFolder
from launcher.messages import notify
from launcher.signal_handlers import handle_stop_signals

# A second Ctrl-C within this time is the first one again: `timeout` and some wrappers deliver it twice.
_REPEATED_SIGNAL_SECONDS = 1.0
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass
class StopSignals:
    """What signals have requested so far. `kill`: kills the ranks that run now."""

    kill: Callable[[], None] = lambda: None
    requested_at: float | None = None  # time.monotonic() of the first signal
    killed: bool = False

    @property
    def requested(self) -> bool:
        return self.requested_at is not None

    def kill_ranks(self) -> None:
        self.killed = True
        self.kill()

    def wait(self, seconds: float) -> None:
        """Wait, but not after a signal."""
        deadline = time.monotonic() + seconds
        while not self.requested and time.monotonic() < deadline:
            time.sleep(0.1)


@contextmanager
def stop_file_on_signal(folder: RunFolder) -> Iterator[StopSignals]:
    """Create RUN/STOP on the first signal and kill the ranks on a later Ctrl-C, or at once on a full or read-only disk.

    The STOP file is removed on exit.
    """
    stop = StopSignals()

    def on_signal(number: int) -> None:
        if stop.requested_at is None:
            stop.requested_at = time.monotonic()
            try:
                folder.stop.touch()
            except OSError as error:
                reason = describe_disk_error(error) or error
                if error.errno in _UNWRITABLE:  # no checkpoint can be saved either
                    notify(f"killing the ranks: {reason}")
                    stop.kill_ranks()
                else:
                    stop.requested_at = None
                    notify(f"cannot create STOP: {reason}; send the signal again")
            else:
                notify("stopping: the ranks save a checkpoint and exit; press Ctrl-C again to kill them")
        elif number == signal.SIGINT and time.monotonic() - stop.requested_at > _REPEATED_SIGNAL_SECONDS:
            stop.kill_ranks()

    try:
        with handle_stop_signals(on_signal):
            yield stop
    finally:
        if stop.requested:
            with suppress(OSError):  # the next launch removes it
                folder.stop.unlink(missing_ok=True)
