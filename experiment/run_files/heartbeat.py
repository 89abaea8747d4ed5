"""Signs of life of the ranks, RUN/logs/rank-N.beat: the activity of each one, and its time without progress.

A thread of the rank writes them (`pretrain.rank_heartbeat`); the launcher reads them and ends a run that hangs
(`launcher.supervision.hang_watch`). Imports little: guards use it, too.
"""

import json
import os
import signal
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

from experiment.run_files.run_folder import RunFolder

STACK_SIGNAL = signal.SIGQUIT
"""A rank that gets it writes the stacks of its threads to its log, as Java does."""

_BEATS = 40  # within the timeout
_MAX_BEAT_SECONDS = 10.0
_HUNG = 0.8  # of the timeout: the rest is for naming the rank within it
_LINE_BYTES = 512
_OUTERMOST = ("in <module>", "in _run_module_as_main", "...")  # ends of a stack's last line; ...: it is cut


@dataclass(frozen=True)
class Heartbeat:
    rank: int
    host: str
    pid: int
    number: int  # of the beat
    step: int  # finished steps
    activity: str
    waits: bool  # for other ranks, in a collective
    stuck_seconds: float  # without progress of its main thread


def beat_seconds(hang_seconds: float) -> float:
    """Return the interval between two heartbeats."""
    return min(_MAX_BEAT_SECONDS, hang_seconds / _BEATS)


def hung_seconds(hang_seconds: float) -> float:
    """Return the time without progress or heartbeat after which a rank counts as hung."""
    return _HUNG * hang_seconds


def write_heartbeat(folder: RunFolder, beat: Heartbeat) -> None:
    """Overwrite the file in place, which a full disk allows. Raises OSError."""
    line = json.dumps(asdict(beat)).encode().ljust(_LINE_BYTES)
    descriptor = os.open(folder.heartbeat(beat.rank), os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)  # a network disk shows it to others then


def read_heartbeat(folder: RunFolder, rank: int) -> Heartbeat | None:
    """Read the heartbeat of a rank; None if there is none yet, or it is being written."""
    try:
        return Heartbeat(**json.loads(folder.heartbeat(rank).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def request_stack(pid: int) -> None:
    """Make a rank on this host write its stacks, also one that is stopped (SIGSTOP): a stopped process cannot, so this
    continues it."""
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, STACK_SIGNAL)
        os.kill(pid, signal.SIGCONT)


def main_stack(log: Path, offset: int) -> list[str]:
    """Return the frames of the main thread in the last stacks of a rank's log, innermost first; empty if there are
    none.

    offset: bytes of the log to skip, which earlier attempts have written.
    """
    try:
        with log.open("rb") as file:
            file.seek(offset)
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    headers = [number for number, line in enumerate(lines) if "hread 0x" in line and "most recent call first" in line]
    if not headers:
        return []
    # The last thread is the main one: faulthandler writes the newest thread first.
    return [line.strip() for line in takewhile(lambda line: line.startswith("  "), lines[headers[-1] + 1 :])]


def is_whole_stack(frames: list[str]) -> bool:
    """Return whether a stack of the main thread has been written to its end: a rank writes line by line, other threads
    first.

    frames: innermost first.
    """
    return bool(frames) and frames[-1].endswith(_OUTERMOST)
