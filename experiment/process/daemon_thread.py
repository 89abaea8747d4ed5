"""Work in a thread that the end of the process does not wait for."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_daemon_thread(function: Callable[[], T], name: str) -> Future[T]:
    """Call `function` in a thread of its own, which ends with its threads of OpenMP: while there are more than cores,
    none spins. The end of the process does not wait for it. `name`: of the thread."""
    result: Future[T] = Future()
    result.set_running_or_notify_cancel()  # a thread cannot be cancelled

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return result
