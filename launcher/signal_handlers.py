"""Handling of the signals that ask a command to stop."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def interrupt(number: int) -> None:
    """A handler that ends the command, as Ctrl-C does by default."""
    raise KeyboardInterrupt


@contextmanager
def handle_stop_signals(handler: Callable[[int], None]) -> Iterator[None]:
    """Call `handler` with the number of each SIGINT, SIGTERM and SIGHUP; restore the previous handlers on exit.

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
            signal.signal(number, original)
