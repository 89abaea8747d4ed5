"""Alerts about a launch."""

from experiment.errors import notify
from experiment.process.signals import handle_stop_signals
from experiment.run_files.outcome_file import Cause, Outcome
from experiment.run_files.run_folder import RunFolder
from experiment.tracking.alerts import Alert, AlertFilter, Messenger, send_last_alert
from experiment.tracking.config import AlertEvent, TrackingConfig
from launcher.supervision.launch_result import LaunchResult


class LaunchAlerts:
    """Sends alerts about a launch; through W&B too when no attempt is about to start."""

    def __init__(self, config: TrackingConfig, folder: RunFolder) -> None:
        """Raises UserError if an environment variable is missing."""
        self._project, self._folder = config.project, folder
        self._events = config.alerts.events
        self._filter = AlertFilter(self._events)
        others = {"W&B": self._send_to_wandb} if config.alerts.wandb else {}
        self._messenger = Messenger(config.alerts, folder, lambda message: notify(f"warning: {message}"), others)

    def report(self, result: LaunchResult, next_step: str = "", restarting: bool = False) -> None:
        """Send an alert if an attempt has failed, or could not save a checkpoint. `next_step`: empty if the launch
        ends."""
        if result.outcome is Outcome.DONE or (result.outcome is Outcome.STOPPED and result.cause is not Cause.AGREED):
            return
        stalled = result.cause is Cause.HUNG and "stall" in self._events
        event: AlertEvent = "stall" if stalled else "crash"
        what, newline, details = result.message.partition("\n")  # details, which services may cut off, come last
        text = f"{result.outcome}: {what}\n{next_step or 'the launch has ended'}{newline}{details}"
        alert = Alert(event, text, restarting, result.outcome)
        if passed := self._filter.filtered(alert):
            self._messenger.alert(passed)

    def _send_to_wandb(self, alert: Alert) -> None:
        """Send an alert to W&B now: the next attempt will have the W&B run open, if there is one."""
        if not alert.repeated:
            send_last_alert(self._project, self._folder, alert)

    def close(self) -> None:
        """Wait a moment for alerts that are not sent yet. A stop signal does not change how the launch has ended."""
        with handle_stop_signals(lambda _: None):
            self._messenger.close()
