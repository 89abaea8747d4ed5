"""End a process that waits for others in C++ code, which no exception interrupts."""

import datetime
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def deadline(timeout: datetime.timedelta, end_process: Callable[[], object]) -> Iterator[None]:
    """Call `end_process` in a thread if the block takes longer than `timeout`."""
    timer = threading.Timer(timeout.total_seconds(), end_process)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
