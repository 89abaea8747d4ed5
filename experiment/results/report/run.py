"""Values of a run for reports, read from its folder once, or repeatedly while it is followed."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from experiment.config import read_recorded
from experiment.errors import UserError, notify
from experiment.results.history import History
from experiment.results.report.tasks import read_task_results
from experiment.run_files.checkpoints import checkpoint_step, complete_checkpoints
from experiment.run_files.goodput import AttemptTime, reached_checkpoints, read_attempt_times
from experiment.run_files.run_folder import RunFolder
from experiment.run_files.run_life import READERS, Life, read_life


@dataclass(frozen=True)
class Run:
    """A run, which may not have started."""

    name: str
    folder: RunFolder
    history: History
    config: Mapping[str, Any]  # of config.yaml; empty if it cannot be read
    results: Mapping[str, Any] | None  # of results.json
    life: Life | None  # None: not known yet
    started: float = 0.0  # when it was, or was resumed, as time.time()
    link: str | None = None  # to its own page
    followed: bool = False  # whether a server keeps the page current

    @cached_property
    def attempt_times(self) -> list[AttemptTime]:
        """Time of the attempts by activity, see `goodput`. Raises OSError."""
        return read_attempt_times(self.folder)

    @property
    def checkpoints(self) -> list[Path]:
        """The complete checkpoints up to the last finished step. Raises OSError."""
        return reached_checkpoints(self.folder, self.attempt_times)

    @property
    def step(self) -> int:
        """The last finished step: a checkpoint may be newer than the last event."""
        step = self.history.step
        with suppress(OSError):
            if any(checkpoint_step(path) > step for path in complete_checkpoints(self.folder.checkpoints)):
                return max([step, *map(checkpoint_step, self.checkpoints)])  # reads the attempts, which takes longer
        return step


OpenRuns = Callable[[Mapping[str, RunFolder]], Sequence[Run]]
"""Opens runs by name."""


def open_run(name: str, folder: RunFolder, life: Life | None = None) -> Run:
    """Read a run. life: as known, if the run calls this. Raises OSError, and UserError for damaged results."""
    history, config, results = History.of(folder), read_recorded(folder.config), read_task_results(folder)
    return Run(name, folder, history, config, results, life or read_life(folder), last_start(folder))


def open_runs(folders: Mapping[str, RunFolder]) -> list[Run]:
    """Read runs; without those that are damaged or not readable, of which it warns."""

    def opened(name: str, folder: RunFolder) -> Run | None:
        try:
            return open_run(name, folder)
        except (UserError, OSError) as error:
            notify(f"warning: {name} is left out: {error}")
            return None

    with ThreadPoolExecutor(READERS) as readers:
        return [run for run in readers.map(opened, folders, folders.values()) if run is not None]


def last_start(folder: RunFolder) -> float:
    with suppress(OSError):
        return folder.config.stat().st_mtime
    return 0.0
