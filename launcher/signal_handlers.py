"""Handling of the signals that ask a command to stop, see `experiment.signals`."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from experiment.signals import STOP_SIGNALS

_STOP_SIGNALS = (*STOP_SIGNALS, signal.SIGHUP)


@contextmanager
def handle_stop_signals(handler: Callable[[int], None]) -> Iterator[None]:
    """Call `handler` with the number of each SIGINT, SIGTERM, SIGUSR1, SIGUSR2 and SIGHUP; restore the previous
    handlers on exit, unless they are ignored by then.

    SIGHUP stays ignored under nohup.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        handler(number)

    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    previous = {number: signal.signal(number, on_signal) for number in _STOP_SIGNALS if number not in ignored}
    try:
        yield
    finally:
        for number, original in previous.items():
            if signal.getsignal(number) is on_signal:
                signal.signal(number, original)


def ignore_stop_signals() -> None:
    """For the rest of a process that ends: it has an exit code, and leaves nothing if it is not interrupted."""
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def interrupt(_number: int) -> None:
    """A handler for `handle_stop_signals` that treats the first signal as Ctrl-C, and ignores others while the command
    ends, which takes seconds. Raises KeyboardInterrupt."""
    ignore_stop_signals()
    raise KeyboardInterrupt
