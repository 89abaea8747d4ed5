"""`RUN/metrics.jsonl`: one JSON object a line for each event of a run, in the order of the steps."""

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiment.files import write_text
from experiment.run_folder import Outcome


class JsonlTracker:
    """Appends each event to `path` at once.

    Events after `resumed_step` are dropped first, so that no step appears twice when a run goes on from a checkpoint.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        kept = [event for event in read_events(path) if event["step"] <= resumed_step]
        write_text(path, "".join(_line(event) for event in kept))
        # Unbuffered: an event is in the file when `log` returns, whatever becomes of the process.
        self._file = path.open("ab", buffering=0)

    def log(self, metrics: Mapping[str, Any]) -> None:
        line = _line(metrics).encode()
        end = self._file.tell()
        if self._file.write(line) != len(line):
            self._file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self, outcome: Outcome) -> None:
        self._file.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events in the file, none where there is no file. A line that a killed process left unfinished is left out."""
    try:
        lines = path.read_bytes().split(b"\n")  # and at nothing else: str.splitlines knows more line ends
    except FileNotFoundError:
        return []
    return [event for event in map(_event, lines) if event is not None]


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("step"), int) else None


def _line(metrics: Mapping[str, Any]) -> str:
    """One line of standard JSON, which has no NaN and no infinity: they become null."""
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in metrics.items()
    }
    return json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"
