"""Peak memory of the processes that a benchmark starts."""

import threading
from contextlib import suppress
from typing import Self

import psutil


class PeakMemory:
    """The highest memory of all processes that are started in a `with` block, by this process or by theirs.

    It is looked at every `seconds`, which takes a core some milliseconds per GB. `bytes`: pages that processes share
    count once (PSS).
    """

    def __init__(self, seconds: float = 2.0) -> None:
        self.bytes = 0
        self._seconds = seconds
        self._before = _started()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._seconds):
            self.bytes = max(self.bytes, sum(map(_memory, _started() - self._before)))


def _started() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _memory(process: psutil.Process) -> int:
    with suppress(psutil.Error):  # it has ended
        return int(process.memory_full_info().pss)
    return 0
