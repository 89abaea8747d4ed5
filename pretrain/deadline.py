"""End a process that waits for others in C++ code, which no exception interrupts."""

import datetime
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def deadline(timeout: datetime.timedelta, expired: Callable[[], object]) -> Iterator[None]:
    """Call `expired` in a thread if the block takes longer than `timeout`."""
    timer = threading.Timer(timeout.total_seconds(), expired)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
