"""A rank's signs of life, which the launcher watches, and the stacks of its threads when it hangs or crashes."""

import faulthandler
import gc
import os
import platform
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import IO

from experiment.run_files.goodput import STARTING, ActivityTimer, CurrentActivity
from experiment.run_files.heartbeat import STACK_SIGNAL, Heartbeat, beat_seconds, hung_seconds, write_heartbeat
from experiment.run_files.run_folder import RunFolder

# Files of the innermost frame while a rank waits for other ranks or, on a GPU, for its device.
_COLLECTIVES = (
    *("/torch/distributed/", "/torch/cuda/"),
    *("/pretrain/training/cpu_group.py", "/pretrain/engine/host_copy.py"),
)
# Code that is on the stack while torch compiles, and not while compiled code runs.
_COMPILERS = ("/torch/_dynamo/convert_frame.py", "/torch/_inductor/compile_fx.py")


class RankHeartbeat:
    """Writes a heartbeat regularly, in a thread, from `start` to the end of the process."""

    def __init__(self, folder: RunFolder, rank: int, hang_seconds: float) -> None:
        self._folder = folder
        self._rank = rank
        self._interval = beat_seconds(hang_seconds)
        self._limit = hung_seconds(hang_seconds)
        self._times: ActivityTimer | None = None
        self._log: IO[bytes] | None = None

    def start(self) -> None:
        with suppress(OSError):  # no room for stacks
            self._log = self._folder.rank_log(self._rank).open("ab", buffering=0)
            faulthandler.enable(self._log)
            faulthandler.register(STACK_SIGNAL, self._log)
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def follow(self, times: ActivityTimer) -> None:
        """Report the step and activity of `times` from now on."""
        self._times = times

    def _run(self) -> None:
        number, stuck, before, checked = 0, 0.0, None, time.monotonic()
        while True:
            doing = CurrentActivity(0, STARTING, 0) if self._times is None else self._times.doing
            frame = _main_frame()
            now = time.monotonic()
            # A machine that was suspended has not hung: count a part of a long pause only.
            elapsed, checked = min(now - checked, self._limit / 4), now
            waits = _is_in(frame, _COLLECTIVES)
            # While the ranks connect, they find themselves which one is missing.
            measured = self._times is not None and (waits or doing.activity != STARTING) and not _compiles(frame)
            was_stuck, stuck = stuck, stuck + elapsed if doing == before and measured else 0.0
            if was_stuck < self._limit <= stuck and self._log is not None:
                with suppress(OSError):
                    faulthandler.dump_traceback(self._log)
            number, before = number + 1, doing
            host, pid = platform.node(), os.getpid()
            with suppress(OSError):
                write_heartbeat(
                    self._folder,
                    Heartbeat(self._rank, host, pid, number, doing.step, doing.activity, waits, round(stuck, 3)),
                )
            del frame
            time.sleep(self._interval)


def _main_frame() -> FrameType | None:
    """Return the innermost frame of the main thread.

    Python 3.11 before 3.11.12 deadlocks if it collects garbage meanwhile (https://github.com/python/cpython/issues/106883).
    """
    collects = gc.isenabled()
    if collects:  # else the main thread may enable it now, and it would stay disabled
        gc.disable()
    try:
        return sys._current_frames().get(threading.main_thread().ident or 0)
    finally:
        if collects:
            gc.enable()


def _is_in(frame: FrameType | None, code: tuple[str, ...]) -> bool:
    return frame is not None and any(part in frame.f_code.co_filename for part in code)


def _compiles(frame: FrameType | None) -> bool:
    while frame is not None:
        if _is_in(frame, _COMPILERS):
            return True
        frame = frame.f_back
    return False
