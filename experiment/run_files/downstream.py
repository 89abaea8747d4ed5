"""Scores of a run's checkpoints on tasks: the files that `deepcloze watch` writes, and their events.

`RUN/downstream/TASK/step-XXXXXXXX.json` is a `DownstreamResult`, one for each scored checkpoint. Only the process that
writes metrics.jsonl logs them: rank 0 of the run, or `deepcloze watch` when the run has ended.
"""

import logging
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from experiment.files import names_in, parse_record, write_json
from experiment.formatting import counted
from experiment.run_files.checkpoints import checkpoint_step
from experiment.run_files.metrics_file import Metrics, read_events
from experiment.run_files.run_folder import RunFolder

log = logging.getLogger(__name__)

_PREFIX = "downstream/"
_NAME = re.compile(r"step-\d+\.json")
_SETTLED = 2_000_000_000  # nanoseconds after which another change of a folder has another time


@dataclass(frozen=True)
class DownstreamResult:
    step: int
    task: str  # as in the name of the folder and of the metrics
    metric: str  # the primary one
    lower_is_better: bool  # of the primary metric
    metrics: dict[str, float]  # on validation, mean over the seeds
    weights: str  # identifies the checkpoint, see `checkpoints.weights_digest`
    config: str  # identifies the settings that the scores depend on
    seconds: float  # that scoring took
    collapsed: int = 0  # seeds that predict the same for every row

    @property
    def value(self) -> float:
        return self.metrics[self.metric]

    def __str__(self) -> str:
        return f"{self.value:.4f}" + (f" ({counted(self.collapsed, 'seed')} collapsed)" if self.collapsed else "")


def write_result(folder: RunFolder, result: DownstreamResult) -> None:
    """Write the file, atomically: it is the record that the checkpoint is scored."""
    write_json(result_file(folder, result.task, result.step), asdict(result))


def result_file(folder: RunFolder, task: str, step: int) -> Path:
    return folder.downstream / task / f"step-{step:08d}.json"


def drop_results(folder: RunFolder, last_step: int) -> None:
    """Delete the results of steps after `last_step`, from which the run resumes: the weights of these steps are
    abandoned. Raises OSError."""
    for task in _task_folders(folder):
        for path, _ in _files(task):
            if checkpoint_step(path.stem) > last_step:
                path.unlink(missing_ok=True)


def read_results(folder: RunFolder) -> list[DownstreamResult]:
    """Read all results of a run, by task and step. Skips damaged files with a warning."""
    files = (file for task in _task_folders(folder) for file in _files(task))
    found = [result for file in files if (result := _read(*file)) is not None]
    return sorted(found, key=lambda result: (result.task, result.step))


def best_result(results: Sequence[DownstreamResult]) -> DownstreamResult:
    """Return the best one by the primary metric, of one task; the first of equal ones."""
    return (min if results[0].lower_is_better else max)(results, key=lambda result: result.value)


class DownstreamLog:
    """Reader of the results that are not in metrics.jsonl yet, for the process that writes it."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._taken: dict[Path, int] = {}  # file -> when it was written, as st_mtime_ns
        self._done: dict[Path, int] = {}  # folder of a task -> when it was last changed, if all in it was taken then

    def take_new(self, last_step: int) -> list[Metrics]:
        """Return the events of results up to `last_step`, in the order of their steps, each once.

        A result that was replaced is new: its checkpoint had other weights before.
        """
        try:
            return [_event(result) for result in self._new_results(last_step)]
        except OSError as error:  # a shared disk does not answer for a moment; tried again at the next call
            log.warning("cannot read the results in %s: %s", self._folder.downstream, error)
            return []

    def _new_results(self, last_step: int) -> list[DownstreamResult]:
        due: dict[Path, int] = {}
        for folder in _task_folders(self._folder):
            changed = folder.stat().st_mtime_ns  # results are renamed into it
            if self._done.get(folder) == changed:
                continue
            unread = {path: written for path, written in _files(folder) if self._taken.get(path) != written}
            reached = {path: written for path, written in unread.items() if checkpoint_step(path.stem) <= last_step}
            self._taken |= reached
            due |= reached
            if len(reached) == len(unread) and time.time_ns() - changed > _SETTLED:
                self._done[folder] = changed
        results = [result for file in due.items() if (result := _read(*file)) is not None]
        new = [result for result in results if not self._is_logged(result)]
        return sorted(new, key=lambda result: (result.step, result.task))

    def _is_logged(self, result: DownstreamResult) -> bool:
        event = _event(result)
        return all(self._logged.get((result.step, key)) == event[key] for key in event if key.startswith(_PREFIX))

    @cached_property
    def _logged(self) -> dict[tuple[int, str], Any]:
        """(step, key) -> last value in metrics.jsonl when this is first needed."""
        return {
            (event["step"], key): value
            for event in read_events(self._folder.metrics)
            for key, value in event.items()
            if key.startswith(_PREFIX)
        }


def _event(result: DownstreamResult) -> Metrics:
    return {"step": result.step} | {f"{_PREFIX}{result.task}/{name}": value for name, value in result.metrics.items()}


def _task_folders(folder: RunFolder) -> list[Path]:
    return [folder.downstream / name for name in names_in(folder.downstream)]


def _files(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield the files of the results of a task, and when they were written."""
    for name in names_in(folder):
        if _NAME.fullmatch(name):
            yield folder / name, (folder / name).stat().st_mtime_ns


@lru_cache(maxsize=10_000)
def _parse(path: Path, _written: int) -> DownstreamResult:
    """Raises OSError and ValueError. _written: when, as st_mtime_ns."""
    result = parse_record(DownstreamResult, path.read_bytes())
    if result.metric not in result.metrics:
        raise ValueError(f"no value of '{result.metric}'")
    return result


def _read(path: Path, written: int) -> DownstreamResult | None:
    try:
        return _parse(path, written)
    except (OSError, ValueError) as error:
        log.warning("skipping the damaged result %s: %s", path, error)
        return None
