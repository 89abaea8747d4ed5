"""Worker processes for text. They start fast, inherit no state and exit when their parent dies."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from multiprocessing import connection, forkserver, get_context, parent_process
from types import ModuleType
from typing import Any, TypeVarTuple

from experiment.errors import StoppedError
from experiment.process.own_process import variable_set
from experiment.process.signals import signals_blocked, uninterrupted

Args = TypeVarTuple("Args")

# If workers are killed, the thread that writes tasks to their pipe waits for a reader, and `shutdown` for the thread:
# https://github.com/python/cpython/issues/94777, fixed in Python 3.11.5.
_FEEDER_HANGS = sys.version_info < (3, 11, 5)


@contextmanager
def worker_pool(
    workers: int, advice: str, initializer: Callable[[*Args], None] | None = None, *initargs: *Args
) -> Iterator[ProcessPoolExecutor]:
    """Open a pool of processes that each call `initializer(*initargs)` first.

    Workers are forked from a fork server, which has no threads or locks that a fork could break. They have the
    environment variables of this process. Ctrl-C does not reach them, nor the fork server while it imports modules.
    Raises StoppedError with `advice` if a worker is killed.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["pretrain.corpus.tasks"])
    closed_to_stop, stop = context.Pipe(duplex=False)
    pool = _Pool(workers, context, _start, (closed_to_stop, dict(os.environ), initializer, initargs))
    try:
        with _isolated():
            with signals_blocked((signal.SIGINT,)):  # Ctrl-C reaches the whole process group; the parent handles it
                forkserver.ensure_running()
            yield pool
    except BrokenProcessPool:
        raise StoppedError(f"a worker process was killed, perhaps because memory ran out; {advice}") from None
    except KeyboardInterrupt:
        stop.close()  # tasks may take minutes
        raise
    finally:
        if _FEEDER_HANGS:
            pool._call_queue._reader.close()  # type: ignore[attr-defined]  # workers have copies
        pool.shutdown(wait=True, cancel_futures=True)


class _Pool(ProcessPoolExecutor):
    def submit(self, *call: Any, **arguments: Any) -> Future[Any]:
        """Submit a call. Ctrl-C waits until then: otherwise the pool could forget a worker that is starting, and remove
        semaphores that it is about to open."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        with uninterrupted() if in_main_thread else nullcontext():
            try:
                return super().submit(*call, **arguments)
            except OSError:  # of a queue that is closed because another worker has been killed just now
                if self._broken:
                    raise BrokenProcessPool(self._broken) from None
                raise


@contextmanager
def _isolated() -> Iterator[None]:
    """Let processes that start in the block import neither the main module, because a script that builds a corpus would
    build it again, nor files in the working directory that have the names of our packages."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        with variable_set("PYTHONSAFEPATH", "1"):
            yield
    finally:
        sys.modules["__main__"] = main


def _start(
    closed_to_stop: connection.Connection,
    environment: dict[str, str],
    initializer: Callable[[*Args], None] | None,
    initargs: tuple[*Args],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # if the fork server has been started by others
    os.environ.clear()  # the fork server has the variables of the first pool
    os.environ.update(environment)
    threading.Thread(target=_exit_with_parent, args=(closed_to_stop,), daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def _exit_with_parent(closed_to_stop: connection.Connection) -> None:
    """Exit with the parent: the workers of a killed one would wait for work forever."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel, closed_to_stop])
    os._exit(1)
