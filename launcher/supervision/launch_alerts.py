"""Alerts about attempts that have failed, which the ranks cannot send."""

from experiment.outcome_file import Cause, Outcome
from experiment.run_folder import RunFolder
from experiment.tracking.alerts import Alert, AlertFilter, Messenger
from experiment.tracking.config import AlertEvent, TrackingConfig
from experiment.tracking.wandb_alert import send_last_alert
from launcher.messages import notify
from launcher.supervision.launch_result import LaunchResult


class LaunchAlerts:
    """Sends alerts while the launch continues: by webhook and mail; when it ends, through W&B too."""

    def __init__(self, config: TrackingConfig, folder: RunFolder) -> None:
        """Raises UserError if an environment variable is missing."""
        self._project, self._folder = config.project, folder
        self._filter = AlertFilter(config.alerts.events)
        others = {"W&B": self._send_to_wandb} if config.alerts.wandb else {}
        self._messenger = Messenger(config.alerts, folder, lambda message: notify(f"warning: {message}"), others)

    def report(self, result: LaunchResult, restarting: str = "") -> None:
        """Send an alert if an attempt has failed. `restarting`: what follows; empty if the launch ends."""
        if result.outcome not in (Outcome.FAILED, Outcome.REFUSED):
            return
        event: AlertEvent = "stall" if result.cause is Cause.HUNG else "crash"
        text = f"{result.outcome}: {result.message}\n{restarting or 'the launch has ended'}"
        alert = Alert(event, text, repeated=bool(restarting))
        if self._filter.passes(alert):
            self._messenger.alert(alert)

    def _send_to_wandb(self, alert: Alert) -> None:
        """The next attempt will have the W&B run open, if there is one."""
        if not alert.repeated:
            send_last_alert(self._project, self._folder, alert)

    def close(self) -> None:
        """Wait a moment for alerts that are not sent yet."""
        self._messenger.close()
