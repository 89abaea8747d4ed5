"""Alerts: messages to people about a run, by mail, webhook, Apprise and Weights & Biases.

They are sent from a thread of their own: sending neither blocks nor fails the run. An alert that cannot be sent is a
warning.
"""

import json
import math
import platform
import re
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import MappingProxyType
from typing import TYPE_CHECKING

from experiment.process.own_process import own_environment
from experiment.run_files.metrics_file import Metrics
from experiment.run_files.outcome_file import Outcome
from experiment.run_files.provenance import read_provenance, wandb_id
from experiment.run_files.run_folder import RunFolder
from experiment.tracking.config import AlertEvent, AlertsConfig
from experiment.tracking.notification import Message, Service, apprise_services, mail_service, webhook_service

if TYPE_CHECKING:
    import wandb

REPEAT_SECONDS = 600.0
"""The time between two alerts about the same kind of event; it doubles while they are about the same problem."""
MOST_REPEAT_SECONDS = 14400.0
"""At most that long; after as long without such an event, it starts anew."""

_NUMBER = re.compile(r"\d+")

_RETRY_WAITS = (0.0, 3.0, 9.0)  # seconds before each attempt to send
FLUSH_SECONDS = 30.0
_WANDB_SECONDS = 25.0  # to send an alert when the run has ended
_WANDB_INIT_SECONDS, _WANDB_FINISH_SECONDS = 12.0, 6.0  # of these
_WANDB_TITLE_LENGTH = 63  # W&B takes no longer ones


@dataclass(frozen=True)
class Alert:
    """A message about a run."""

    event: AlertEvent
    text: str
    repeated: bool = True  # whether it is held back if there was one about such an event shortly before
    outcome: Outcome = Outcome.FAILED  # of the run, if `send_last_alert` sends it


@dataclass
class _Past:
    """Alerts about an event."""

    seen: float = -math.inf  # when the last one came
    sent: float = -math.inf
    problem: str = ""  # the first line of the one that was sent, without steps, ranks and times
    wait: float = 0.0  # seconds from `sent` to the next one about the same problem
    held: int = 0  # number of those that were held back since `sent`


class AlertFilter:
    """Holds alerts back if there was one about the same event shortly before, or their event is none of `events`."""

    def __init__(self, events: Sequence[AlertEvent], clock: Callable[[], float] = time.monotonic) -> None:
        self._events = frozenset(events)
        self._clock = clock
        self._past: defaultdict[AlertEvent, _Past] = defaultdict(_Past)

    def filtered(self, alert: Alert) -> Alert | None:
        """Return the alert to send, with the number of those before it that were not; None to hold it back."""
        if alert.event not in self._events:
            return None
        now, past = self._clock(), self._past[alert.event]
        first, newline, rest = alert.text.partition("\n")
        problem = _NUMBER.sub("", first)
        is_new = problem != past.problem or now - past.seen >= MOST_REPEAT_SECONDS
        is_new |= alert.event == "no_checkpoint"  # it has an interval of its own
        past.seen = now
        if alert.repeated and now - past.sent < (REPEAT_SECONDS if is_new else past.wait):
            past.held += 1
            return None
        more = f"\n{past.held:,} more since the last alert" if past.held else ""  # before a log, which may be cut off
        past.problem, past.sent, past.held = problem, now, 0
        past.wait = REPEAT_SECONDS if is_new else min(2 * past.wait, MOST_REPEAT_SECONDS)
        return replace(alert, text=first + more + newline + rest)


class Messenger:
    """Sends alerts as `config` says, and in other ways. It is a tracker, too, which records no metrics."""

    def __init__(
        self,
        config: AlertsConfig,
        folder: RunFolder,
        warn: Callable[[str], None],
        others: Mapping[str, Callable[[Alert], None]] = MappingProxyType({}),
    ) -> None:
        """Raises UserError if an environment variable is missing. warn: shows why an alert could not be sent. others:
        name -> another way to send an alert; it is tried again after an OSError."""
        self._run = folder.path
        self._channels = [_Channel(name, send, warn) for name, send in others.items()]
        for service in alert_services(config):
            self._channels.append(_Channel(service.name, partial(self._send, service), warn))

    def log(self, metrics: Metrics) -> None:
        """Metrics are not sent."""

    def alert(self, alert: Alert) -> None:
        for channel in self._channels:
            channel.alerts.put(alert)

    def close(self, outcome: Outcome | None = None) -> None:
        """Wait until all alerts are sent, for at most `FLUSH_SECONDS`."""
        end = time.monotonic() + FLUSH_SECONDS
        for channel in self._channels:
            channel.alerts.put(None)
        for channel in self._channels:
            channel.wait(end)

    def _send(self, service: Service, alert: Alert) -> None:
        run, host = str(self._run), platform.node()
        fields = {"event": alert.event, "message": alert.text, "run": run, "host": host}
        title = f"{self._run.name}: {alert.event.replace('_', ' ')}"
        service.send(Message(title, alert.text, f"\n\nrun: {run}\nhost: {host}\n", fields))


class _Channel:
    """Sends alerts one after the other in a thread."""

    def __init__(self, name: str, send: Callable[[Alert], None], warn: Callable[[str], None]) -> None:
        self._name, self._send, self._warn = name, send, warn
        self.alerts: SimpleQueue[Alert | None] = SimpleQueue()  # to send; None: no further one will come
        self._worker = threading.Thread(target=self._work, name=f"alerts by {name}", daemon=True)
        self._worker.start()

    def wait(self, end: float) -> None:
        """Wait until all are sent, or `time.monotonic()` reaches `end`."""
        self._worker.join(max(0.0, end - time.monotonic()))
        if self._worker.is_alive():
            self._warn(f"alerts by {self._name} are given up: no answer in time")

    def _work(self) -> None:
        while (alert := self.alerts.get()) is not None:
            if problem := self._try(alert):
                self._warn(f"the alert '{alert.event}' could not be sent by {self._name}: {problem}")

    def _try(self, alert: Alert) -> str:
        """Send an alert. Returns why it could not be sent; empty if it was."""
        problem = ""
        for wait in _RETRY_WAITS:
            time.sleep(wait)
            try:
                self._send(alert)
                return ""
            except OSError as error:  # all errors of urllib's requests and smtplib, too
                problem = f"{type(error).__name__}: {error}"
            except subprocess.CalledProcessError as error:  # W&B's
                return ": ".join([type(error).__name__, *error.stderr.splitlines()[-1:]])
            except Exception as error:
                return type(error).__name__  # the message of an InvalidURL contains the URL, which is secret
        return problem


def alert_services(config: AlertsConfig) -> list[Service]:
    """Return the services that `config` names. Raises UserError if an environment variable is missing or wrong."""
    services = [webhook_service()] if config.webhook else []
    services += [mail_service(config.email)] if config.email is not None else []
    return services + (apprise_services() if config.apprise else [])


def send_by_wandb(run: "wandb.Run", alert: Alert, name: str) -> None:
    """Send an alert about the run called `name`."""
    title = f"{alert.event.replace('_', ' ')}: {name}"
    run.alert(title[:_WANDB_TITLE_LENGTH], alert.text, "INFO" if alert.event == "finish" else "ERROR")


def send_last_alert(project: str, folder: RunFolder, alert: Alert) -> None:
    """Send an alert through the W&B run of a run that has ended, also if its rank 0 was killed, and mark it there as
    failed or stopped. Uses a process of its own, which can be ended.

    Raises subprocess.SubprocessError if that fails, or takes too long.
    """
    if (provenance := read_provenance(folder)) is None:  # rank 0 has not opened a W&B run
        return
    request = [project, wandb_id(provenance), str(folder.path), alert.event, alert.text, alert.outcome]
    command = [sys.executable, "-P", "-c", f"from {__name__} import send_requested; send_requested()"]
    subprocess.run(
        command,
        env=own_environment(),
        input=json.dumps(request),
        text=True,
        capture_output=True,
        timeout=_WANDB_SECONDS,
        check=True,
    )


def send_requested() -> None:
    """Send the alert that `send_last_alert` writes to stdin."""
    import wandb

    project, run_id, folder, event, text, outcome = json.load(sys.stdin)
    settings = wandb.Settings(
        init_timeout=_WANDB_INIT_SECONDS,
        finish_timeout=_WANDB_FINISH_SECONDS,
        silent=True,
        console="off",
        x_disable_stats=True,
        symlink=False,  # `latest-run` keeps pointing at what rank 0 may not have uploaded
    )
    # The empty name and tags keep those of the run: None would stand for WANDB_NAME and WANDB_TAGS.
    run = wandb.init(project=project, id=run_id, dir=folder, resume="must", name="", tags=(), settings=settings)
    send_by_wandb(run, Alert(event, text), Path(folder).name)
    if outcome == Outcome.STOPPED:
        run.mark_preempting()
    run.finish(exit_code=Outcome(outcome).exit_code)
