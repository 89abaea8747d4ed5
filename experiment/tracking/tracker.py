"""Where the figures of a run go: console, `metrics.jsonl` and Weights & Biases, as one tracker.

Rank 0 alone opens trackers. A tracker that fails is reported once and never stops the run or the other trackers.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Protocol

from experiment.run_folder import Outcome, RunFolder
from experiment.tracking.config import TrackingConfig
from experiment.tracking.console import ConsoleTracker
from experiment.tracking.jsonl import JsonlTracker
from experiment.tracking.weights_and_biases import WandbTracker

logger = logging.getLogger(__name__)

Metrics = Mapping[str, int | float | str | None]


class Tracker(Protocol):
    """Takes the events of a run, one flat mapping each; every event has the key `step` (finished steps)."""

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
    unit: str = "step",
) -> Tracker:
    """The trackers that `config` asks for, as one.

    total_steps: where the run ends, None where that is not known in steps. resumed_step: the finished steps of the
    checkpoint that the run goes on from, -1 for a run that begins; later events in `metrics.jsonl` are dropped.
    run_id: the same one at each attempt of a run. parameters: the resolved config. unit: what the console calls a step.
    """
    openers: dict[str, Callable[[], Tracker]] = {
        "the console": lambda: ConsoleTracker(total_steps, resumed_step, unit),
        "metrics.jsonl": lambda: JsonlTracker(folder.metrics, resumed_step),
    }
    if config.wandb != "disabled":
        openers["W&B"] = lambda: WandbTracker(config, folder, run_id, parameters)
    trackers: dict[str, Tracker] = {}
    for name, opener in openers.items():
        try:
            trackers[name] = opener()
        except Exception as error:
            logger.warning("the tracker of %s could not be opened, the run goes on: %s", name, error)
    return _Trackers(trackers)


class _Trackers:
    """Several trackers as one. Each is tried at every event: a full disk may have room again at the next."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = trackers
        self._reported: set[str] = set()

    def log(self, metrics: Metrics) -> None:
        self._each(lambda tracker: tracker.log(metrics))

    def close(self, outcome: Outcome) -> None:
        self._each(lambda tracker: tracker.close(outcome))

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in self._trackers.items():
            try:
                action(tracker)
            except Exception as error:
                if name not in self._reported:
                    self._reported.add(name)
                    logger.warning(
                        "the tracker of %s failed, the run goes on: %s: %s", name, type(error).__name__, error
                    )
