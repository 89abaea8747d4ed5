"""The trackers of a run as one: console, `metrics.jsonl`, TensorBoard and Weights & Biases.

Only rank 0 opens trackers. A tracker that fails is reported once and never stops the run or the other trackers.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from experiment.outcome_file import Outcome
from experiment.run_folder import RunFolder
from experiment.tracking.config import TrackingConfig
from experiment.tracking.console import ConsoleTracker
from experiment.tracking.event_file import TensorBoardTracker, require_tensorboard
from experiment.tracking.jsonl import JsonlTracker, kept_events
from experiment.tracking.metrics import Metrics
from experiment.tracking.weights_and_biases import WandbTracker

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Records the events of a run."""

    def log(self, metrics: Metrics) -> None: ...

    def close(self, outcome: Outcome) -> None: ...


@dataclass(frozen=True)
class TrackedRun:
    """What trackers know of a run."""

    run_id: str  # the same for all attempts
    parameters: Mapping[str, object]  # the resolved config
    total_steps: int | None  # the last step; None if it is not known (a time budget)
    resumed_step: int  # finished steps of the checkpoint it resumes from, -1 for a new run; later events are dropped
    evaluates_again: bool = False  # the evaluation of `resumed_step` is dropped too: the checkpoint lacks it
    unit: str = "step"  # what the console calls a step


def check_tracking(config: TrackingConfig) -> None:
    """Raises UserError if a tracker needs a package that is missing."""
    if config.tensorboard:
        require_tensorboard()


def open_trackers(config: TrackingConfig, folder: RunFolder, run: TrackedRun, console: bool = True) -> Tracker:
    """Open the trackers that `config` enables, as one. console: whether the terminal is one of them."""
    resumed = run.resumed_step, run.evaluates_again
    openers: dict[str, Callable[[], Tracker]] = {"metrics.jsonl": lambda: JsonlTracker(folder.metrics, *resumed)}
    if console:
        shown = {"the console": lambda: ConsoleTracker(run.total_steps, run.resumed_step, run.unit)}
        openers = {**shown, **openers}
    if config.tensorboard:
        openers["TensorBoard"] = lambda: TensorBoardTracker(folder.tensorboard, *resumed)
    if config.wandb != "disabled":
        kept = partial(kept_events, folder.metrics, *resumed)
        openers["W&B"] = lambda: WandbTracker(config, folder, run.run_id, run.parameters, kept())
    return _TrackerGroup(openers)


class _TrackerGroup:
    """Several trackers as one. A tracker that failed, or could not be opened, is tried again at every event: a full
    disk may have room by then."""

    def __init__(self, openers: Mapping[str, Callable[[], Tracker]]) -> None:
        self._unopened = dict(openers)
        self._trackers: dict[str, Tracker] = {}
        self._reported: set[str] = set()
        self._open_missing(None)

    def log(self, metrics: Metrics) -> None:
        if self._unopened:
            self._open_missing(metrics["step"])
        self._each(lambda tracker: tracker.log(metrics))

    def close(self, outcome: Outcome) -> None:
        self._each(lambda tracker: tracker.close(outcome))

    def _open_missing(self, step: object) -> None:
        """Open the trackers that are not open. step: of the event that follows; None at the start."""
        for name, opener in list(self._unopened.items()):
            try:
                self._trackers[name] = opener()
            except Exception as error:
                if step is None:
                    logger.warning("could not open the tracker for %s; trying again at every event: %s", name, error)
                continue
            del self._unopened[name]
            if step is not None:
                message = "opened the tracker for %s at step %s; earlier events of this attempt are missing"
                logger.warning(message, name, step)

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in self._trackers.items():
            try:
                action(tracker)
            except Exception as error:
                if name not in self._reported:
                    self._reported.add(name)
                    logger.warning(
                        "the tracker for %s failed; the run continues: %s: %s", name, type(error).__name__, error
                    )
