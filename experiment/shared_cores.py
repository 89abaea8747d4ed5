"""How torch's threads wait for each other on CPU cores that other processes use too.

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

_SECONDS = 0.25  # between looks
_BUSY, _IDLE = 0.1, 0.03  # seconds per second that the threads of this process wait for a core, all together
_CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@cache
def share_cores() -> None:
    """From now on, let threads spin only while no other process takes cores away from them.

    Starts a thread that looks how long the threads of this process wait for cores. Results do not depend on it. Does
    nothing on a single core, where another OpenMP is used, where Linux does not count these times, and if the user has
    set GOMP_SPINCOUNT or OMP_WAIT_POLICY. Call it after torch has been imported.
    """
    library = openmp_path()
    if (
        library
        and len(os.sched_getaffinity(0)) > 1
        and _nanoseconds_waited()
        and not any(map(os.environ.get, _CHOICES))
    ):
        threading.Thread(target=_watch, args=(ctypes.CDLL(library),), name="share-cores", daemon=True).start()


def openmp_path() -> str | None:
    """The library that torch has loaded."""
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = line.split(maxsplit=5)[-1]
            if "/torch/lib/libgomp" in path:
                return path
    return None


def _nanoseconds_waited() -> dict[str, int]:
    """How long each thread of this process has waited for a core, by thread id."""
    found = {}
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # the thread has ended
            found[path.parent.name] = int(path.read_text().split()[1])
    return found


def _watch(openmp: ctypes.CDLL) -> None:
    spinning = Spinning(openmp)
    start, before = time.monotonic(), _nanoseconds_waited()
    while True:
        time.sleep(_SECONDS)
        now, waited = time.monotonic(), _nanoseconds_waited()
        spinning.adapt(waiting_share(before, waited, now - start))
        start, before = now, waited


def waiting_share(before: Mapping[str, int], after: Mapping[str, int], seconds: float) -> float:
    """Seconds per second that threads waited for a core, from nanoseconds by thread id."""
    return sum(waited - before.get(thread, waited) for thread, waited in after.items()) / (1e9 * seconds)


class Spinning:
    """How long threads of OpenMP spin: the default at first."""

    def __init__(self, openmp: ctypes.CDLL) -> None:
        self._openmp = openmp
        self._team: _SleepingTeam | None = None

    def adapt(self, share: float) -> None:
        """Shorten the spinning, or lengthen it again. share: as from `waiting_share`."""
        if self._team is None and share > _BUSY:
            self._team = _SleepingTeam(self._openmp)
        elif self._team is not None and share < _IDLE:
            self._team.end()
            self._team = None


class _SleepingTeam:
    """More threads of OpenMP than there are cores, which sleep. As long as they exist, other threads hardly spin."""

    def __init__(self, openmp: ctypes.CDLL) -> None:
        self._ended = threading.Event()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._hold, args=(openmp, ready), name="sleeping-team", daemon=True)
        self._thread.start()
        ready.wait()

    def _hold(self, openmp: ctypes.CDLL, ready: threading.Event) -> None:
        nothing = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p)  # a function that each thread calls once
        openmp.GOMP_parallel(nothing, None, len(os.sched_getaffinity(0)) + 1, 0)
        ready.set()
        self._ended.wait()  # OpenMP ends the team with the thread that has started it

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
