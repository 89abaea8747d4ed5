"""Event files for TensorBoard: one of a pretraining run, one for each seed of a fine-tuning run.

A file is written with TensorBoard's own record format and messages, one record for each event. TensorBoard's
`EventFileWriter`, which torch uses too, writes from a thread: a kill loses up to two minutes, and a full disk ends the
thread. Steps that are logged again after a crash are removed from the file: TensorBoard's faster loader, its default,
and most other readers ignore `purge_step`.
"""

import io
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiment.files import atomic_write
from experiment.run_files.metrics_file import AppendFile, Metrics, is_kept
from experiment.run_files.outcome_file import Outcome

_PREFIX = "events.out.tfevents."  # by which TensorBoard recognises its files
_SPEED = (
    *("tokens_per_second", "mfu", "data_wait", "goodput"),
    *("checkpoint_seconds", "slowest_rank", "slowest_rank_ratio", "memory"),
)
_LENGTH, _CHECKSUM = 8, 4  # bytes: a record is its length, a checksum of that, the message, and a checksum of that


class TensorBoardTracker:
    """Writes the numbers of each event by step, see `tag_of`.

    Each attempt starts a new file in `folder` with the events before that it does not log again, see `is_kept`.
    """

    def __init__(self, folder: Path, resumed_step: int, evaluates_again: bool = False) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        earlier = sorted(folder.glob(f"{_PREFIX}*"))
        path = folder / f"{_PREFIX}{_next_number(earlier):020d}.{platform.node()}"
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            file.write(_record(file_version="brain.Event:2"))
            file.write(_record(session_log=SessionLog(status=SessionLog.START)))  # forget earlier content
            file.writelines(_kept_records(earlier, resumed_step, evaluates_again))
        for replaced in earlier:
            replaced.unlink()
        self._file = AppendFile(path)

    def log(self, metrics: Metrics) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=tag_of(name), simple_value=value)
            for name, value in metrics.items()
            if name not in ("step", "seed") and isinstance(value, int | float)
        ]
        self._file.append(_record(step=metrics["step"], summary=Summary(value=values)))

    def close(self, outcome: Outcome) -> None:
        self._file.close()


class SeedsTensorBoardTracker:
    """Writes an event file for each seed of a fine-tuning run, to `folder`/seed-N, with the seed's own steps."""

    def __init__(self, folder: Path, resumed_step: int, evaluates_again: bool = False, *, seed_steps: int) -> None:
        """resumed_step: over all seeds. seed_steps: steps of one seed."""
        self._folder, self._resumed, self._seed_steps = folder, (resumed_step, evaluates_again), seed_steps
        self._trackers: dict[object, TensorBoardTracker] = {}

    def log(self, metrics: Metrics) -> None:
        seed, step = metrics["seed"], metrics["step"]
        assert isinstance(step, int)
        own_step = (step - 1) % self._seed_steps + 1
        if seed not in self._trackers:
            resumed_step, evaluates_again = self._resumed
            own_resumed = resumed_step - (step - own_step)
            self._trackers[seed] = TensorBoardTracker(self._folder / f"seed-{seed}", own_resumed, evaluates_again)
        self._trackers[seed].log({**metrics, "step": own_step})

    def close(self, outcome: Outcome) -> None:
        for tracker in self._trackers.values():
            tracker.close(outcome)


def tag_of(name: str) -> str:
    """Return the tag of a metric. TensorBoard groups tags by the part before the first slash."""
    return name if "/" in name else f"{'speed' if name in _SPEED else 'train'}/{name}"


def _next_number(files: list[Path]) -> int:
    """Return the number in the next file name: TensorBoard reads files in order of their names, and the clock of the
    host that wrote the last one may have been ahead."""
    numbers = [path.name.removeprefix(_PREFIX).partition(".")[0] for path in files]
    return max([time.time_ns(), *(int(number) + 1 for number in numbers if number.isdecimal())])


def _kept_records(files: list[Path], resumed_step: int, evaluates_again: bool) -> list[bytes]:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    kept: list[bytes] = []
    for path in files:
        for record in _read_records(path):
            event = Event.FromString(record[_LENGTH + _CHECKSUM : -_CHECKSUM])
            if event.session_log.status == SessionLog.START:
                kept.clear()  # an attempt that was killed here had not removed the files before
            elif event.HasField("summary"):
                names = [value.tag for value in event.summary.value]
                if is_kept(event.step, names, resumed_step, evaluates_again):
                    ungrouped = [value for value in event.summary.value if value.tag != tag_of(value.tag)]
                    for value in ungrouped:  # of version 0.2.0
                        value.tag = tag_of(value.tag)
                    parts = {"wall_time": event.wall_time, "step": event.step, "summary": event.summary}
                    kept.append(_record(**parts) if ungrouped else record)
    return kept


def _read_records(path: Path) -> Iterator[bytes]:
    """Yield the records of a file, without one that a killed process left incomplete."""
    with path.open("rb") as file:
        while len(header := file.read(_LENGTH + _CHECKSUM)) == _LENGTH + _CHECKSUM:
            length = int.from_bytes(header[:_LENGTH], "little") + _CHECKSUM
            if len(rest := file.read(length)) < length:
                return
            yield header + rest


def _record(**fields: Any) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    RecordWriter(buffer).write(Event(**{"wall_time": time.time(), **fields}).SerializeToString())
    return buffer.getvalue()
