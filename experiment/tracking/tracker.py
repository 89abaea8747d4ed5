"""The trackers of a run as one: console, `metrics.jsonl`, TensorBoard, Weights & Biases and alerts.

Only rank 0 opens trackers. A tracker that fails is reported once until it works again, and never stops the run or the
other trackers.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Protocol

from experiment.errors import UserError
from experiment.process.own_process import has_launcher
from experiment.run_files.metrics_file import JsonlTracker, Metrics, kept_events
from experiment.run_files.outcome_file import Outcome
from experiment.run_files.run_folder import RunFolder
from experiment.tracking.alerts import FLUSH_SECONDS, Alert, AlertFilter, Messenger, alert_services
from experiment.tracking.config import AlertEvent, TrackingConfig
from experiment.tracking.event_file import SeedsTensorBoardTracker, TensorBoardTracker
from experiment.tracking.progress_line import RATE_EVENTS, ConsoleTracker
from experiment.tracking.weights_and_biases import FINISH_SECONDS, WandbTracker

logger = logging.getLogger(__name__)

# `Trackers.close` has returned by then, unless a disk does not answer: W&B, alerts, and a minute to write files.
CLOSE_SECONDS = FINISH_SECONDS + FLUSH_SECONDS + 60.0


class Tracker(Protocol):
    """Records the events of a run."""

    def log(self, metrics: Metrics) -> None: ...

    def close(self, outcome: Outcome) -> None: ...


@dataclass(frozen=True)
class TrackedRun:
    """Facts about a run for its trackers."""

    wandb_id: str  # see `provenance.wandb_id`
    parameters: Mapping[str, object]  # the resolved config
    total_steps: int | None  # the last step; None if it is not known (a time budget)
    resumed_step: int  # finished steps of the checkpoint it resumes from, -1 for a new run; later events are dropped
    evaluates_again: bool = False  # the evaluation of `resumed_step` is dropped too: the checkpoint lacks it
    seed_steps: int | None = None  # of each seed of a fine-tuning run
    seconds_left: float | None = None  # of a time budget
    paused: Callable[[], float] = float  # returns the seconds of evaluations and checkpoints so far


def check_tracking(config: TrackingConfig) -> None:
    """Raise UserError if a tracker or an alert needs a package or an environment variable that is missing."""
    if config.tensorboard and find_spec("tensorboard") is None:
        raise UserError("tracking.tensorboard: tensorboard not installed; run: pip install 'deepcloze[tensorboard]'")
    if config.wandb != "disabled" and find_spec("wandb") is None:
        raise UserError("tracking.wandb: wandb not installed; run: pip install wandb, or set it to disabled")
    alert_services(config.alerts)


def open_trackers(config: TrackingConfig, folder: RunFolder, run: TrackedRun, console: bool = True) -> "Trackers":
    """Open the trackers that `config` enables, as one. console: whether the terminal is one of them."""
    resumed = run.resumed_step, run.evaluates_again
    openers: dict[str, Callable[[], Tracker]] = {}
    if console:
        rate_events = None if run.seed_steps else RATE_EVENTS  # time passes between two seeds, without steps
        openers["the console"] = lambda: ConsoleTracker(
            run.total_steps, run.resumed_step, run.seconds_left, rate_events, run.paused
        )
    openers["metrics.jsonl"] = lambda: JsonlTracker(folder.metrics, *resumed)
    if config.tensorboard and run.seed_steps:
        openers["TensorBoard"] = partial(
            SeedsTensorBoardTracker, folder.tensorboard, *resumed, seed_steps=run.seed_steps
        )
    elif config.tensorboard:
        openers["TensorBoard"] = lambda: TensorBoardTracker(folder.tensorboard, *resumed)
    if config.wandb != "disabled":
        kept = partial(kept_events, folder.metrics, *resumed)
        openers["W&B"] = lambda: WandbTracker(config, folder, run.wandb_id, run.parameters, kept())
    if config.alerts.webhook or config.alerts.apprise or config.alerts.email is not None:
        openers["alerts"] = lambda: Messenger(config.alerts, folder, lambda message: logger.warning("%s", message))
    return Trackers(openers, config.alerts.events)


class Trackers:
    """Several trackers as one. A tracker that failed, or could not be opened, is tried again at every event: a full
    disk may have room by then."""

    def __init__(self, openers: Mapping[str, Callable[[], Tracker]], events: Sequence[AlertEvent] = ()) -> None:
        """`events`: to send alerts about."""
        self._unopened = dict(openers)
        self._trackers: dict[str, Tracker] = {}
        self._reported: set[str] = set()
        self._filter = AlertFilter(events)
        self._last: dict[str, int | float | str | None] = {}  # metric -> its last value
        self._open_missing(None)

    def log(self, metrics: Metrics) -> None:
        if self._unopened:
            self._open_missing(metrics["step"])
        self._last |= metrics
        self._each(lambda tracker: tracker.log(metrics))

    def alert(self, alert: Alert) -> None:
        """Send an alert, unless the config says otherwise or there was one of its kind shortly before. The launcher
        sends those about crashes, if there is one: this process might be killed."""
        if not (alert.event == "crash" and has_launcher()) and (passed := self._filter.filtered(alert)):
            self._each(lambda tracker: tracker.alert(passed), (WandbTracker, Messenger))

    def summarize(self, scores: Mapping[str, float]) -> None:
        """Record the results of the whole run, where other runs are compared with it."""
        self._each(lambda tracker: tracker.summarize(scores), (WandbTracker,))

    def close(self, outcome: Outcome, step: int | None = None) -> None:
        """`step`: the last one, if the last event may be of another step."""
        self.alert(_ending(outcome, self._last if step is None else {**self._last, "step": step}))
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

    def _each(self, action: Callable[[Any], None], kinds: tuple[type, ...] = (object,)) -> None:
        for name, tracker in list(self._trackers.items()):  # the mirror's thread sends alerts while others are opened
            if not isinstance(tracker, kinds):
                continue
            try:
                action(tracker)
            except Exception as error:
                if name not in self._reported:
                    self._reported.add(name)
                    logger.warning(
                        "the tracker for %s failed; the run continues: %s: %s", name, type(error).__name__, error
                    )
            else:
                self._reported.discard(name)


def _ending(outcome: Outcome, last: Metrics) -> Alert:
    """Return the alert at the end of a run. `last`: metric -> its last value."""
    loss = f", loss {value:.4f}" if isinstance(value := last.get("loss"), float) else ""
    text = f"{outcome} at step {last['step']}{loss}" if last else str(outcome)
    return Alert("crash" if outcome is Outcome.FAILED else "finish", text, repeated=False)
