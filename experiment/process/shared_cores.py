"""Waiting of torch's threads for each other on CPU cores that other processes use too.

A thread of GNU's OpenMP, which torch's packages for Linux contain, spins for 3 ms before it sleeps. Nothing is faster
on an idle machine. But if another process takes the core of one thread, that thread cannot move to the core of a
spinning one: beside one busy process, training may be forty times slower. OpenMP shortens the spinning to less than a
microsecond while it manages more threads than there are cores, which is decided anew at each wait.
"""

import ctypes
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

_SECONDS = 0.25  # between measurements
_BUSY, _IDLE = 0.2, 0.06  # share of its time for which a thread waits for a core
_CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@cache
def share_cores() -> None:
    """Let threads spin only while no other process takes cores away from them, from now on.

    Starts a thread that looks how long the threads of this process wait for cores. Results do not depend on it. Does
    nothing with a GPU, with a single core or thread, where another OpenMP is used, where Linux does not count these
    times, and if the user has set GOMP_SPINCOUNT or OMP_WAIT_POLICY.
    """
    import torch

    cores = len(os.sched_getaffinity(0))
    if torch.cuda.is_available() or min(cores, torch.get_num_threads()) == 1 or any(map(os.environ.get, _CHOICES)):
        return
    if (openmp := load_openmp()) is not None and _counts_times():
        args = (Spinning(openmp, cores), torch.get_num_threads())
        threading.Thread(target=_watch, args=args, name="share-cores", daemon=True).start()


os.register_at_fork(after_in_child=share_cores.cache_clear)  # threads do not survive a fork


def load_openmp() -> ctypes.CDLL | None:
    """Return the GNU OpenMP library that torch uses; None if it uses none, or if that is uncertain."""
    with suppress(OSError):
        lines = Path("/proc/self/maps").read_bytes().splitlines()
        loaded = {os.fsdecode(line.split(maxsplit=5)[-1]) for line in lines if b"/libgomp" in line}
        own = {path for path in loaded if "/torch/lib/" in path or "/torch.libs/" in path}
        if len(own or loaded) == 1:
            return ctypes.CDLL((own or loaded).pop())
    return None


def _counts_times() -> bool:
    with suppress(OSError):
        return int(Path("/proc/self/schedstat").read_bytes().split()[2]) > 0  # how often it got a core
    return False


class ThreadTimes(NamedTuple):
    """Nanoseconds since the start of a thread."""

    ran: int
    waited: int  # for a core


def _thread_times() -> dict[int, ThreadTimes]:
    """Return the times of each thread of this process, by id. Skips threads of lower priority."""
    niceness = os.getpriority(os.PRIO_PROCESS, 0)  # on Linux, of a thread
    found = {}
    for folder in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # the thread has ended
            if os.getpriority(os.PRIO_PROCESS, thread := int(folder.name)) <= niceness:
                found[thread] = ThreadTimes(*map(int, (folder / "schedstat").read_bytes().split()[:2]))
    return found


def _watch(spinning: "Spinning", team: int) -> None:
    start, before = time.monotonic(), _thread_times()
    with suppress(RuntimeError):
        while True:
            time.sleep(_SECONDS)
            now, times = time.monotonic(), _thread_times()
            spinning.adapt(waiting_share(before, times, team, now - start))
            start, before = now, times


def waiting_share(
    before: Mapping[int, ThreadTimes], after: Mapping[int, ThreadTimes], team: int, seconds: float
) -> float:
    """Return the largest share of its time for which a computing thread waited for a core.

    before, after: times by thread id, `seconds` apart. team: number of threads that compute. They are the ones that ran
    most: a server has other threads, which wait for them.
    """
    passed = [
        ThreadTimes(times.ran - before[thread].ran, times.waited - before[thread].waited)
        for thread, times in after.items()
        if thread in before
    ]
    return max((times.waited for times in sorted(passed)[-team:]), default=0) / (1e9 * seconds)


class Spinning:
    """How long threads of OpenMP spin: the default at first."""

    def __init__(self, openmp: ctypes.CDLL, cores: int) -> None:
        self._openmp = openmp
        self._threads = cores + 1  # of a team that keeps others from spinning, while it sleeps
        self._team: threading.Thread | None = None  # starts the others
        self._ended = threading.Event()

    def adapt(self, share: float) -> None:
        """Shorten the spinning, or lengthen it again. share: as from `waiting_share`. Raises RuntimeError if the system
        refuses more threads."""
        if self._team is None and share > _BUSY:
            _check_startable(self._threads)
            self._ended.clear()
            ready = threading.Event()
            self._team = threading.Thread(target=self._hold, args=(ready,), name="sleeping-team", daemon=True)
            self._team.start()
            ready.wait()
        elif self._team is not None and share < _IDLE:
            self._ended.set()
            self._team.join()
            self._team = None

    def _hold(self, ready: threading.Event) -> None:
        nothing = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p)  # a function that each thread calls once
        self._openmp.GOMP_parallel(nothing, None, self._threads, 0)
        ready.set()
        self._ended.wait()  # OpenMP ends the team with the thread that has started it


def _check_startable(count: int) -> None:
    """Raise RuntimeError if the system refuses this many more threads: OpenMP would end the process."""
    tried = threading.Event()
    started = []
    try:
        for _ in range(count + 1):  # and the one that starts them
            thread = threading.Thread(target=tried.wait, daemon=True)
            thread.start()
            started.append(thread)
    finally:
        tried.set()
        for thread in started:
            thread.join()
