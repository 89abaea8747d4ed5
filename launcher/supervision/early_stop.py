"""Ends ranks that do not train yet when the launch is asked to stop: nothing can be lost.

They may be starting, or wait for each other in C++ code, on many hosts. Later, rank 0 finds the STOP file itself.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from experiment.run_folder import RunFolder
from launcher.supervision.polling import polled
from launcher.supervision.stop_signals import StopSignals

_POLL_SECONDS = 0.5


@contextmanager
def kill_on_early_stop(folder: RunFolder, stop: StopSignals) -> Iterator[threading.Event]:
    """Kill the ranks, which sets the event, on a signal or STOP file until rank 0 trains."""
    killed = threading.Event()

    def is_settled() -> bool:
        with suppress(OSError, ValueError):  # a network disk does not answer for a moment
            if stop.killed or _has_begun_to_train(folder):
                return True
            if stop.requested or folder.stop in folder.path.iterdir():
                killed.set()
                stop.kill_ranks()
                return True
        return False

    with polled(is_settled, _POLL_SECONDS, "early stop"):
        yield killed


def _has_begun_to_train(folder: RunFolder) -> bool:
    """Whether rank 0 trains, or has ended."""
    record = folder.rank_record(0)
    if record not in folder.logs.iterdir():  # a network file system may answer a lookup by name from a cache
        return False
    process = json.loads(record.read_text(encoding="utf-8"))
    return process["training"] or process["exit"] is not None
