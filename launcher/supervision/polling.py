"""Check something at intervals while other code runs."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def polled(is_settled: Callable[[], bool], seconds: float, name: str) -> Iterator[None]:
    """Call `is_settled` every so many seconds in a thread of this name, until it returns True or the block ends."""
    ended = threading.Event()

    def poll() -> None:
        while not ended.wait(seconds):
            if is_settled():
                return

    thread = threading.Thread(target=poll, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
