"""`RUN/metrics.jsonl`: one JSON object per event, one event per line.

The events of training are in the order of the steps; the scores of `deepcloze watch` come later than their steps.
"""

import errno
import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from experiment.files import write_text
from experiment.outcome_file import Outcome
from experiment.strict_json import parse_json
from experiment.tracking.metrics import Metrics

_TAIL_BYTES = 1 << 18

Event = dict[str, Any]  # parsed JSON; has an integer `step`


class JsonlTracker:
    """Appends each event to `path` immediately.

    Drops first what a resume logs again: the file's events after `resumed_step`, and the evaluation of that step if
    `evaluates_again`.
    """

    def __init__(self, path: Path, resumed_step: int, evaluates_again: bool = False) -> None:
        kept = [event for event in read_events(path) if event["step"] <= resumed_step]
        if evaluates_again:
            kept = [event for event in kept if event["step"] < resumed_step or not _is_evaluation(event)]
        write_text(path, "".join(_line(event) for event in kept))
        # Unbuffered: an event is in the file when `log` returns, even if the process is killed right after.
        self._file = path.open("ab", buffering=0)
        self._end = self._file.tell()  # size of the file up to the last complete line
        self._torn = False  # whether a failed write may have left a part of a line after `_end`

    def log(self, metrics: Metrics) -> None:
        line = _line(metrics).encode()
        self._remove_torn_line()
        self._torn = True
        if self._file.write(line) != len(line):
            with suppress(OSError):  # tried again before the next write
                self._remove_torn_line()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end += len(line)
        self._torn = False

    def close(self, outcome: Outcome) -> None:
        with self._file:
            self._remove_torn_line()

    def _remove_torn_line(self) -> None:
        """The file is open for appending: the next write goes to its new end, wherever the last one stopped."""
        if self._torn:
            self._file.truncate(self._end)
            self._torn = False


def read_events(path: Path) -> list[Event]:
    """The events in the file; empty if there is no file. Skips a line that a killed process left incomplete."""
    try:
        lines = path.read_bytes().split(b"\n")  # not str.splitlines, which also splits at U+2028 and others
    except FileNotFoundError:
        return []
    return [event for event in map(_event, lines) if event is not None]


def read_last_events(path: Path) -> list[Event]:
    """The last events in the file, hundreds at least, as `read_events`: in no time after weeks of training."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    return [event for event in map(_event, lines) if event is not None]


def _event(line: bytes) -> Event | None:
    try:
        event = parse_json(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("step"), int) else None


def _is_evaluation(event: Event) -> bool:
    return any(key.startswith("eval/") for key in event)


def _line(metrics: Metrics) -> str:
    """One line of standard JSON, which has no NaN or infinity: they become null."""
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in metrics.items()
    }
    return json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"
