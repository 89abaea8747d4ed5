"""Turns signals to the launcher into a STOP file, for which the training loop checks.

Ranks that do not train yet are ended.
"""

import errno
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from experiment.errors import describe_disk_error, notify
from experiment.files import exists_uncached
from experiment.process.signals import SignalHistory, handle_stop_signals
from experiment.run_files.goodput import STARTING
from experiment.run_files.heartbeat import read_heartbeat
from experiment.run_files.outcome_file import RankRecord
from experiment.run_files.run_folder import RunFolder
from launcher.supervision.rank_processes import polled

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_POLL_SECONDS = 0.5
_BAR_LINES = 3  # that rank 0 erases at most when it redraws its progress bar in 80 columns


class StopSignals:
    """Requests to stop the ranks of a launch."""

    def __init__(self, folder: RunFolder) -> None:
        self.killed = False
        self.abandoned = False
        self._kill: Callable[[], None] = lambda: None  # no rank is running
        self._file = folder.stop
        self._signals = SignalHistory()
        self._requested = False  # by a signal
        self._signal_name: str | None = None  # of the signal after which STOP was created

    @property
    def requested(self) -> bool:
        return self.killed or self._requested

    def explain(self, message: str) -> str:
        """Replace the STOP file, in the message of ranks that stopped, by the signal that created it."""
        if self._signal_name is None:
            return message
        return message.replace(f"found {self._file}", f"the launcher got {self._signal_name}")

    def is_asked_for(self) -> bool:
        """Return whether a signal or a STOP file asks to stop. If the run folder cannot be read, only signals count."""
        with suppress(OSError):
            if exists_uncached(self._file):
                return True
        return self.requested

    def wait(self, seconds: float) -> None:
        """Wait, but not after a signal or with a STOP file."""
        deadline = time.monotonic() + seconds
        while not self.is_asked_for() and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(_POLL_SECONDS, left))

    @contextmanager
    def killing(self, kill: Callable[[], None]) -> Iterator[None]:
        """Let `kill_ranks` call `kill` in the block. If `kill_ranks` was called before, `kill` is called at once."""
        before, self._kill = self._kill, kill
        try:
            if self.killed:  # `kill_ranks` may run in another thread: it sets `killed`, then reads `_kill`
                kill()
            yield
        finally:
            self._kill = before

    def kill_ranks(self, reason: str = "") -> None:
        """Kill the ranks at once. They can resume from the last complete checkpoint."""
        if reason:
            notify(f"killing the ranks: {reason}", _BAR_LINES)
        self.killed = True
        self._kill()

    def abandon(self, reason: str) -> None:
        """Kill the ranks, and leave the run folder to another launch."""
        self.abandoned = True
        self.kill_ranks(reason)

    @contextmanager
    def handle(self) -> Iterator[None]:
        """Create RUN/STOP on the first signal; kill the ranks on a second one, or at once if the disk is full. The STOP
        file is removed on exit."""
        try:
            with handle_stop_signals(self._on_signal):
                yield
        finally:
            if self._signal_name is not None:
                with suppress(OSError):  # the next launch removes it
                    self._file.unlink(missing_ok=True)

    def _on_signal(self, number: int) -> None:
        is_second, name = self._signals.is_second(number), signal.Signals(number).name
        if not self._requested:
            self._request(name)
        elif is_second:
            self.kill_ranks(f"a second signal, {name}")

    def _request(self, name: str) -> None:
        self._requested = True
        try:
            self._file.touch()
        except OSError as error:
            reason = describe_disk_error(error) or error
            if error.errno in _UNWRITABLE:  # no checkpoint can be saved either
                self.kill_ranks(str(reason))
            else:
                self._requested = False
                notify(f"cannot create STOP: {reason}; send the signal again", _BAR_LINES)
        else:
            self._signal_name = "SIGINT (Ctrl-C)" if name == "SIGINT" else name
            what = "created STOP: ranks that train save a checkpoint, and exit"
            notify(f"stopping: {what}; press Ctrl-C again to kill them", _BAR_LINES)


@contextmanager
def kill_on_early_stop(folder: RunFolder, stop: StopSignals) -> Iterator[threading.Event]:
    """Kill the ranks, which sets the event, on a signal or STOP file until rank 0 trains."""
    killed = threading.Event()

    def is_settled() -> bool:
        with suppress(OSError, ValueError):  # a network disk does not answer for a moment
            if stop.killed or _has_begun_to_train(folder):
                return True
            if stop.is_asked_for():
                killed.set()
                stop.kill_ranks()
                return True
        return False

    with polled(is_settled, _POLL_SECONDS, "early stop"):
        yield killed


def _has_begun_to_train(folder: RunFolder) -> bool:
    """Return whether rank 0 trains, or has ended."""
    record = folder.rank_record(0)
    if not exists_uncached(record):
        return False
    process = RankRecord.read(record)
    return is_training(folder, process) or process.exit is not None


def is_training(folder: RunFolder, process: RankRecord) -> bool:
    """Return whether a rank looks for stop requests itself. Its record may not say so, if the disk was full then; its
    heartbeat does within seconds."""
    beat = read_heartbeat(folder, process.rank)
    shown = beat is not None and (beat.host, beat.pid) == (process.host, process.pid) and beat.activity != STARTING
    return process.training or shown
