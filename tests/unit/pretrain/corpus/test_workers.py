import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, process
from typing import Any

import pytest

from experiment.errors import StoppedError
from pretrain.corpus import workers
from pretrain.corpus.workers import worker_pool

pickled: list[bool] = []


class Interrupting:
    """Is interrupted while a worker starts, to which it is sent."""

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        signal.raise_signal(signal.SIGINT)
        pickled.append(True)
        return str, ("received",)


def test_ctrl_c_waits_until_a_worker_has_started() -> None:
    """Catches a worker that the pool forgets, and that prints a traceback because its semaphores are removed."""
    pickled.clear()
    with pytest.raises(KeyboardInterrupt), worker_pool(1, "", len, Interrupting()) as pool:
        pool.submit(abs, -1)
    assert pickled == [True]


def test_workers_have_the_environment_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches credentials that a notebook sets after its first corpus and that workers do not get, or get although they
    were removed; and a variable that is left to the caller."""
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    for key in ("old", "new", None):
        if key is None:
            monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        else:
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        with worker_pool(1, "") as pool:
            assert pool.submit(os.getenv, "AWS_ACCESS_KEY_ID").result() == key
    assert "PYTHONSAFEPATH" not in os.environ


def test_a_worker_is_killed_while_another_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback: the thread that notices closes the queue that the new worker is about to get."""

    def submit(pool: Any, *_: object) -> None:
        pool._broken = "a process ended"
        raise OSError("handle is closed")

    monkeypatch.setattr(ProcessPoolExecutor, "submit", submit)
    with pytest.raises(StoppedError, match="killed"), worker_pool(1, "") as pool:
        pool.submit(abs, -1)


def terminate_broken(manager: Any, cause: object) -> None:
    """`_ExecutorManagerThread.terminate_broken` of Python 3.11.4 and older: leaves the pipe of tasks open."""
    executor = manager.executor_reference()
    executor._broken, executor._shutdown_thread = "A worker was killed", True
    for item in manager.pending_work_items.values():
        item.future.set_exception(process.BrokenProcessPool())
    manager.pending_work_items.clear()
    manager.join_executor_internals()


def lose_the_worker(pool: ProcessPoolExecutor) -> None:
    killed = pool.submit(os._exit, 1)
    pool.submit(len, bytes(1 << 22))  # more than a pipe holds
    killed.result()


def interrupt(pool: ProcessPoolExecutor) -> None:
    pool.submit(time.sleep, 600)
    pool.submit(len, bytes(1 << 22))
    raise KeyboardInterrupt


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="the method has another name")
@pytest.mark.parametrize(("end", "error"), [(lose_the_worker, StoppedError), (interrupt, KeyboardInterrupt)])
def test_tasks_that_no_worker_reads(
    monkeypatch: pytest.MonkeyPatch, end: Callable[[ProcessPoolExecutor], None], error: type[BaseException]
) -> None:
    """Catches a command that hangs after a worker was killed or after Ctrl-C, with Python 3.11.2 as in Debian 12."""
    monkeypatch.setattr(process._ExecutorManagerThread, "terminate_broken", terminate_broken)
    monkeypatch.setattr(workers, "_FEEDER_HANGS", True)
    with pytest.raises(error), worker_pool(1, "") as pool:
        end(pool)
