"""Worker processes for text: they start quickly, inherit nothing and never outlive who started them."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from typing import Any

from experiment.errors import StoppedError


@contextmanager
def worker_pool(workers: int, start: Callable[..., None] | None = None, *args: Any) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes each call `start(*args)` first. Raises StoppedError where one of them is killed.

    Workers come from a server process that never held threads, locks or libraries, so they can be forked safely.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["pretrain.corpus.encoding", "pretrain.corpus.python_docs.docstrings"])
    pool = ProcessPoolExecutor(workers, context, _start, (start, args))
    try:
        yield pool
    except BrokenProcessPool:
        raise StoppedError(
            "a worker process was killed, perhaps for want of memory (fewer --workers need less); "
            "the same command goes on with what is finished"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(start: Callable[..., None] | None, args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if start is not None:
        start(*args)


def _end_with_parent() -> None:
    """Workers of a killed parent would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
