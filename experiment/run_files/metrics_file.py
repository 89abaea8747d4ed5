"""`RUN/metrics.jsonl`: one JSON object per event, one event per line.

The events of training are in the order of the steps; the scores of `deepcloze watch` come later than their steps.
"""

import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic_core import from_json

from experiment.files import write_text
from experiment.run_files.outcome_file import Outcome

T = TypeVar("T")

_TAIL_BYTES = 1 << 18
_BLOCK_BYTES = 1 << 20  # read at a time: no other thread runs while they are parsed
_COMPARED_BYTES = 1 << 10

Metrics = Mapping[str, int | float | str | None]
"""An event: flat keys, null where a value is unknown. Every event has `step`, the number of finished steps."""

Event = dict[str, Any]
"""An event that was read; `step` is an integer."""

SLOW_RATIO = 1.5
"""A rank that takes this many times as long as the median rank is slow."""


class JsonlTracker:
    """Appends each event to `path` immediately.

    First drops events that a resumed run logs again, see `kept_events`.
    """

    def __init__(self, path: Path, resumed_step: int, evaluates_again: bool = False) -> None:
        write_events(path, kept_events(path, resumed_step, evaluates_again))
        self._file = AppendFile(path)

    def log(self, metrics: Metrics) -> None:
        self._file.append(_line(metrics).encode())

    def close(self, outcome: Outcome) -> None:
        self._file.close()


def kept_events(path: Path, resumed_step: int, evaluates_again: bool = False) -> list[Event]:
    """Return the events in the file that a resumed run does not log again, see `is_kept`."""
    return [event for event in read_events(path) if is_kept(event["step"], event, resumed_step, evaluates_again)]


def is_kept(step: int, names: Iterable[str], resumed_step: int, evaluates_again: bool) -> bool:
    """Return whether a run that resumes after `resumed_step` does not log an event again.

    Args:
        step: of the event.
        names: of its metrics.
        evaluates_again: whether the run starts with the evaluation of `resumed_step`.
    """
    is_repeated = evaluates_again and is_evaluation(names)
    return step < resumed_step or (step == resumed_step and not is_repeated)


def is_evaluation(names: Iterable[str]) -> bool:
    return any(name.startswith("eval/") for name in names)


def read_events(path: Path) -> list[Event]:
    """Return the events in the file; empty if there is no file. Skips a line that a killed process left incomplete."""
    try:
        return _parse(path.read_bytes())
    except FileNotFoundError:
        return []


def write_events(path: Path, events: Iterable[Metrics]) -> None:
    """Replace the file."""
    write_text(path, "".join(map(_line, events)))


def read_last_events(path: Path) -> list[Event]:
    """Return the last events in the file, hundreds at least, as `read_events`; fast for files of any size."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return _parse(file.read())
    except FileNotFoundError:
        return []


class EventReader:
    """Reads the events in a file that grows, each once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._end = 0  # of the lines that were read
        self._before_end = b""  # bytes that the file must still have there
        self._size: int | None = None  # of the file; None: not known yet

    @property
    def unread(self) -> float:
        """The share of the file that is not read, such as an incomplete line."""
        if self._size is None:
            return 1.0
        return 1.0 - self._end / self._size if self._size else 0.0

    def read_new(self) -> Iterator[list[Event] | None]:
        """Yield the events of complete lines that are new, in blocks; None before them if the file was rewritten or is
        gone: earlier events are no longer valid. Raises OSError."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            if self._end:
                yield None
            self._end, self._before_end, self._size = 0, b"", 0
            return
        with file:
            self._size = os.fstat(file.fileno()).st_size
            file.seek(self._end - len(self._before_end))
            if file.read(len(self._before_end)) != self._before_end:
                yield None
                self._end, self._before_end = file.seek(0), b""
            read = b""
            while block := file.read(_BLOCK_BYTES):
                lines, newline, read = (read + block).rpartition(b"\n")
                self._end += len(lines) + len(newline)
                self._before_end = (self._before_end + lines + newline)[-_COMPARED_BYTES:]
                yield _parse(lines)


def last_number(events: Sequence[Event], key: str) -> Any:
    """Return the last number with this key; None without any."""
    values = (event.get(key) for event in reversed(events))
    return next((value for value in values if type(value) in (int, float)), None)


def _parse(lines: bytes) -> list[Event]:
    """Parse lines, except those that are no events."""
    complete, _, last = lines.rpartition(b"\n")  # not str.splitlines, which also splits at U+2028 and others
    try:
        found = from_json(b"[" + complete.strip(b"\n").replace(b"\n", b",") + b"]")
    except ValueError:  # one of them is damaged
        found = [_value(line) for line in complete.split(b"\n")]
    return [event for event in (*found, _value(last)) if isinstance(event, dict) and isinstance(event.get("step"), int)]


def _value(line: bytes) -> Any:
    try:
        return from_json(line)
    except ValueError:
        return None


def _line(metrics: Metrics) -> str:
    """Format a line of standard JSON, which has no NaN or infinity: they become null."""
    plain = {key: finite_or_none(value) for key, value in metrics.items()}
    return json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"


def finite_or_none(value: T) -> T | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class AppendFile:
    """Appends records to `path`: each is in the file when `append` returns, and no part of one stays there."""

    def __init__(self, path: Path) -> None:
        # Unbuffered: a record is in the file even if the process is killed right after.
        self._file = path.open("ab", buffering=0)
        self._end = self._file.tell()  # size of the file up to the last complete record
        self._torn = False  # whether a failed write may have left a part of a record after `_end`

    def append(self, record: bytes) -> None:
        """Append a record. Raises OSError if it does not fit."""
        self._remove_torn_record()
        self._torn = True
        if self._file.write(record) != len(record):
            with suppress(OSError):  # tried again before the next write
                self._remove_torn_record()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end += len(record)
        self._torn = False

    def close(self) -> None:
        with self._file:
            self._remove_torn_record()

    def _remove_torn_record(self) -> None:
        """Cut off a torn record. The file is open for appending: the next write goes to its new end, wherever the last
        one stopped."""
        if self._torn:
            self._file.truncate(self._end)
            self._torn = False
