"""Run the tasks of a build or a cleaning: in worker processes on this machine, or on a Ray cluster.

Both schedule, and both give results in the order of completion. A task is a function of a job, which all tasks share,
and of its own argument. It can be run again, on another machine too: Ray does so if a node is lost.
"""

import logging
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from experiment.errors import StoppedError, UserError, first_line
from experiment.process.cpu_cores import cpu_cores
from pretrain.corpus.workers import worker_pool

T = TypeVar("T")
R = TypeVar("R")

_TASKS_PER_WORKER = 2  # that are submitted: one to run and one to follow
_NAMED = 3  # parts, in a message
_RETRIES = 5  # on Ray, of a task whose process or node dies
_RESUME = "run the same command again to resume from what is finished"
_KILLED = f"use fewer --workers, and {_RESUME}"


class TaskRunner(Protocol):
    """Runs `function(job, task)` for each of the tasks, and yields the results in the order of completion. Takes few
    tasks ahead of time, so that they can be read while others run. A task may have a `place`, for messages."""

    def __call__(self, function: Callable[[Any, T], R], tasks: Iterable[T]) -> Iterator[R]: ...


def open_task_runner(
    workers: int | None, job: object, engine: str = "local", ray_address: str | None = None
) -> AbstractContextManager[TaskRunner]:
    """Run tasks on Ray for the engine `ray`, otherwise in `workers` processes, by default one per core.

    Raises UserError if there is no cluster, StoppedError if a worker on this machine is killed, or a task on Ray dies
    again and again.
    """
    return _ray(ray_address, job) if engine == "ray" else _local(workers or cpu_cores(), job)


@contextmanager
def _local(workers: int, job: object) -> Iterator[TaskRunner]:
    with ExitStack() as stack:
        pools: list[Any] = []

        def run_tasks(function: Callable[[Any, T], R], tasks: Iterable[T]) -> Iterator[R]:
            remaining = iter(tasks)
            first = list(islice(remaining, 2))
            remaining = chain(first, remaining)
            if workers == 1 or len(first) < 2:
                yield from (function(job, task) for task in remaining)
                return
            if not pools:
                pools.append(stack.enter_context(worker_pool(workers, _KILLED, _start_worker, job)))
            running = dict[Future[R], str]()  # in the order in which workers begin them
            while True:
                try:
                    for task in islice(remaining, _TASKS_PER_WORKER * workers - len(running)):
                        running[pools[0].submit(_run_in_worker, function, task)] = _place(task)
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        yield future.result()
                        del running[future]
                except BrokenProcessPool:
                    left = [place for future, place in running.items() if not future.done() or future.exception()]
                    raise _killed([*dict.fromkeys(left[:workers])]) from None

        yield run_tasks


def _place(task: object) -> str:
    return getattr(task, "place", "a part")


def _killed(places: Sequence[str]) -> StoppedError:
    """The error for a worker that was killed while it handled one of these parts."""
    more = f", or one of {len(places) - _NAMED} others" if len(places) > _NAMED else ""
    named = f", with {', or '.join(places[:_NAMED])}{more}" if places else ""
    return StoppedError(f"a worker process was killed, perhaps because memory ran out{named}; {_KILLED}")


_job: object = None


def _start_worker(job: object) -> None:
    global _job
    _job = job


def _run_in_worker(function: Callable[[Any, T], R], task: T) -> R:
    return function(_job, task)


@contextmanager
def _ray(address: str | None, job: object) -> Iterator[TaskRunner]:
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # by default Ray tries 20 times, of 40 s each, to connect
    os.environ.setdefault("RAY_task_oom_retries", str(_RETRIES))  # otherwise without end, whatever max_retries
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs Ray; install it with: pip install 'deepcloze[ray]'") from None
    connected = not ray.is_initialized()  # otherwise by the caller of `deepcloze.build_corpus`
    try:
        if connected:
            ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:  # ConnectionError is an OSError
        raise UserError(
            f"--ray_address {address or 'auto'}: no Ray cluster answers ({first_line(error)}); "
            "start one with `ray start --head`"
        ) from None
    folder = str(Path.cwd())
    shared = [ray.put(job)]  # Ray would give each task a new copy of a reference that is an argument of its own
    # A task is repeated if it is lost with its node. If it raises an error, that is the result.
    remote = ray.remote(max_retries=_RETRIES)(_outcome)

    def run_tasks(function: Callable[[Any, T], R], tasks: Iterable[T]) -> Iterator[R]:
        remaining, running = iter(tasks), dict[Any, str]()
        while True:
            cores = int(ray.cluster_resources().get("CPU", 1))  # nodes come and go
            for task in islice(remaining, max(0, _TASKS_PER_WORKER * cores - len(running))):
                running[remote.remote(shared, folder, function, task)] = _place(task)
            if not running:
                return
            (done,), _ = ray.wait([*running], num_returns=1)
            yield _result(done, running.pop(done))

    try:
        yield run_tasks
    finally:
        if connected:
            ray.shutdown()


def _result(reference: Any, place: str) -> Any:
    """Return the result of a task on Ray. Raises the error that it has returned, and StoppedError if it has died."""
    import ray
    from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

    try:
        outcome = ray.get(reference)
    except (NodeDiedError, OutOfMemoryError, WorkerCrashedError) as error:
        raise StoppedError(
            f"{place}: the task died {_RETRIES + 1} times, perhaps because memory ran out: "
            f"{first_line(error)}; {_RESUME}"
        ) from None
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


@lru_cache(maxsize=1)
def _fetched(job: Any) -> object:
    """Return the job, which the tasks of a worker share: it keeps models and lists that take long to load."""
    import ray

    return ray.get(job)


def check_shared(folder: Path) -> None:
    """Raise UserError if a task does not see a folder that its main process has made."""
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist on {platform.node()}; expected a disk that all machines share")


def _outcome(shared: list[Any], folder: str, function: Callable[[Any, T], R], task: T) -> R | Exception:
    """Return the result of the task, or the UserError or OSError that it raises. folder: the working directory."""
    with suppress(OSError):  # a node may lack it if all paths are absolute or URLs
        os.chdir(folder)
    try:
        return function(_fetched(*shared), task)
    except (UserError, OSError) as error:
        return error
