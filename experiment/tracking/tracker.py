"""The trackers of a run as one: console, `metrics.jsonl` and Weights & Biases.

Only rank 0 opens trackers. A tracker that fails is reported once and never stops the run or the other trackers.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Protocol

from experiment.outcome_file import Outcome
from experiment.run_folder import RunFolder
from experiment.tracking.config import TrackingConfig
from experiment.tracking.console import ConsoleTracker
from experiment.tracking.jsonl import JsonlTracker
from experiment.tracking.metrics import Metrics
from experiment.tracking.weights_and_biases import WandbTracker

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Records the events of a run."""

    def log(self, metrics: Metrics) -> None: ...

    def close(self, outcome: Outcome) -> None: ...


def open_trackers(
    config: TrackingConfig,
    folder: RunFolder,
    *,
    total_steps: int | None,
    resumed_step: int,
    run_id: str,
    parameters: Mapping[str, object],
    evaluates_again: bool = False,
    unit: str = "step",
) -> Tracker:
    """Open the trackers that `config` enables, as one.

    total_steps: the last step, None if it is not known (a time budget). resumed_step: finished steps of the checkpoint
    that the run resumes from, -1 for a new run; later events in `metrics.jsonl` are dropped. evaluates_again: so is the
    evaluation of `resumed_step`, which the checkpoint lacks. run_id: the same for all attempts of a run.
    parameters: the resolved config. unit: what the console calls a step.
    """
    openers: dict[str, Callable[[], Tracker]] = {
        "the console": lambda: ConsoleTracker(total_steps, resumed_step, unit),
        "metrics.jsonl": lambda: JsonlTracker(folder.metrics, resumed_step, evaluates_again),
    }
    if config.wandb != "disabled":
        openers["W&B"] = lambda: WandbTracker(config, folder, run_id, parameters)
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
