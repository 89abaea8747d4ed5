"""The signals that ask a process to stop: which of them ends it at once, and how they are handled or blocked."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

WARNING_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
"""Batch systems send one of them, as the user chooses, some time before they end a job, perhaps to all its processes.
W&B would die: it is started with these blocked."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, *WARNING_SIGNALS)

HANDLED_SIGNALS = (*STOP_SIGNALS, signal.SIGHUP)
"""The signals that a command which can be resumed handles. Batch systems and systemd may send them to all processes of
a launch. DeepSpeed's launchers, pdsh and ssh would die, and the ranks with them: they start with these blocked."""

REPEATED_SECONDS = 1.0
"""A signal within this time of the first one repeats it: terminals, `timeout` and launchers deliver one several times.
"""

_AGAIN_SECONDS = 0.05  # until a signal during an import is sent again
_IMPORT_SECONDS = 60.0  # that a signal waits for imports at most: one may hang
_delayed: dict[int, float] = {}  # the signal that waits for an import -> since when


class SignalHistory:
    """The stop signals that a process has received."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: in seconds."""
        self._clock = clock
        self._first: dict[int, float] = {}  # signal -> when it first came

    def is_second(self, number: int) -> bool:
        """Add a signal. Return whether it comes after another one, and is not a repetition.

        SIGTERM comes second only after SIGTERM: batch systems send it after a warning and before SIGKILL. SIGHUP never
        does: it tells that the terminal was closed, perhaps during the save that another signal asked for.
        """
        since = self._first.get(number) if number == signal.SIGTERM else min(self._first.values(), default=None)
        now = self._clock()
        self._first.setdefault(number, now)
        return number != signal.SIGHUP and since is not None and now - since > REPEATED_SECONDS


@contextmanager
def signals_blocked(numbers: Collection[int]) -> Iterator[None]:
    """Block signals in this thread, and in the threads and processes that the block starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def handle_stop_signals(handler: Callable[[int], None], numbers: Collection[int] = HANDLED_SIGNALS) -> Iterator[None]:
    """Call `handler` with the number of each of these signals; restore the previous handlers on exit, unless they are
    ignored by then.

    SIGHUP stays ignored under nohup. The first signal during imports is handled when they have ended: an exception
    would leave modules half imported, and libraries that catch it would use them.
    """
    outside = _count_imports(sys._getframe())  # of a script that is imported itself

    def on_signal(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if _count_imports(frame) <= outside or now - min(_delayed.values(), default=now) >= _IMPORT_SECONDS:
            _delayed.clear()
            handler(number)
        elif number in _delayed or not _delayed:
            _delayed.setdefault(number, now)
            _send_again(number)

    handlers = {number: signal.getsignal(number) for number in numbers}
    if handlers.get(signal.SIGHUP) is signal.SIG_IGN:
        del handlers[signal.SIGHUP]
    # A handler in C, for which Python has None, could not be restored.
    previous = {number: signal.signal(number, on_signal) for number, found in handlers.items() if found is not None}
    try:
        yield
    finally:
        for number, original in previous.items():
            if signal.getsignal(number) is on_signal:
                signal.signal(number, original)
        _delayed.clear()


def await_delayed_signal() -> None:
    """Wait until a signal that came during imports is handled, if all have ended."""
    while _delayed and _count_imports(sys._getframe()) == 0:
        time.sleep(_AGAIN_SECONDS)


def _count_imports(frame: FrameType | None) -> int:
    """Count the frames of imports in progress, from this frame outwards."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename == "<frozen importlib._bootstrap>"
        frame = frame.f_back
    return count


def _send_again(number: int) -> None:
    """Send a signal to this thread, the main one, in a moment."""
    timer = threading.Timer(_AGAIN_SECONDS, signal.pthread_kill, (threading.get_ident(), number))
    timer.daemon = True
    timer.start()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay stop signals until the block has ended. Call it in the main thread."""
    numbers: list[int] = []
    with handle_stop_signals(numbers.append):
        yield
    if numbers:
        signal.raise_signal(numbers[0])


def kill_group(group: int) -> None:
    """Kill the processes of a group, if there are any."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def ignore_stop_signals() -> None:
    """Ignore stop signals while a process ends: it has an exit code, and leaves nothing if it is not interrupted."""
    for number in HANDLED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def interrupt(_number: int) -> None:
    """Handle the first signal as Ctrl-C, and ignore others while the command ends, which takes seconds: a handler for
    `handle_stop_signals`. Raises KeyboardInterrupt."""
    ignore_stop_signals()
    raise KeyboardInterrupt
