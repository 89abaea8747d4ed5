import os
import signal
from pathlib import Path
from typing import Any

import pytest

from experiment.files import write_json
from experiment.process.signals import handle_stop_signals
from experiment.run_files.outcome_file import Cause, Outcome
from experiment.run_files.run_folder import RunFolder
from experiment.tracking import alerts as alerts_module
from experiment.tracking.alerts import Alert, Messenger
from experiment.tracking.config import AlertsConfig, TrackingConfig
from launcher.supervision.launch_alerts import LaunchAlerts
from launcher.supervision.launch_result import LaunchResult
from wandb_server import wandb_server


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Alert]:
    alerts: list[Alert] = []
    monkeypatch.setattr(Messenger, "alert", lambda self, alert: alerts.append(alert))
    return alerts


def test_failed_attempts_are_told(sent: list[Alert], tmp_path: Path) -> None:
    """Catches a failed run without an alert, a stall that is called a crash, a mail for every restart within minutes,
    and a last failure that is held back because of them; and messages about launches that were stopped or are done."""
    alerts = LaunchAlerts(TrackingConfig(), RunFolder(tmp_path))
    killed = LaunchResult(Outcome.FAILED, "rank 1 was killed", Cause.KILLED)
    for restarting in ("restarting", "restarting in 5 s", ""):
        alerts.report(killed, restarting, restarting=bool(restarting))
    alerts.report(LaunchResult(Outcome.FAILED, "rank 0 hangs", Cause.HUNG), "restarting", restarting=True)
    for outcome in (Outcome.DONE, Outcome.STOPPED):
        alerts.report(LaunchResult(outcome))
    alerts.close()
    assert [(alert.event, alert.text) for alert in sent] == [
        ("crash", "failed: rank 1 was killed\nrestarting"),
        ("crash", "failed: rank 1 was killed\n1 more since the last alert\nthe launch has ended"),
        ("stall", "failed: rank 0 hangs\nrestarting"),
    ]


def test_a_run_that_cannot_save_is_told_with_the_reason(sent: list[Alert], tmp_path: Path) -> None:
    """Catches a full disk that ends a run, and only an alert that it was stopped."""
    alerts = LaunchAlerts(TrackingConfig(), RunFolder(tmp_path))
    alerts.report(LaunchResult(Outcome.STOPPED, "no checkpoint can be written: the disk is full", Cause.AGREED))
    alerts.report(LaunchResult(Outcome.STOPPED, "stopped: SIGTERM", Cause.SIGNAL))
    alerts.close()
    text = "stopped: no checkpoint can be written: the disk is full\nthe launch has ended"
    assert [(alert.event, alert.text) for alert in sent] == [("crash", text)]


def test_the_next_step_is_told_before_details(sent: list[Alert], tmp_path: Path) -> None:
    """Catches an alert that says whether the run is restarted after a log, where services cut it off."""
    alerts = LaunchAlerts(TrackingConfig(), RunFolder(tmp_path))
    killed = LaunchResult(Outcome.FAILED, "rank 1 was killed\nthe end of rank-1.log:\n…", Cause.KILLED)
    alerts.report(killed, "restarting", restarting=True)
    alerts.close()
    assert [alert.text for alert in sent] == ["failed: rank 1 was killed\nrestarting\nthe end of rank-1.log:\n…"]


def test_a_stall_is_a_crash_for_those_who_want_no_stalls(sent: list[Alert], tmp_path: Path) -> None:
    """Catches a run that hangs and ends without an alert because `events` names crashes only."""
    alerts = LaunchAlerts(TrackingConfig(alerts=AlertsConfig(events=("crash", "finish"))), RunFolder(tmp_path))
    alerts.report(LaunchResult(Outcome.FAILED, "rank 0 hangs", Cause.HUNG))
    alerts.close()
    assert [(alert.event, alert.text) for alert in sent] == [
        ("crash", "failed: rank 0 hangs\nthe launch has ended"),
    ]


def test_a_signal_while_alerts_are_sent_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that has failed, but exits with 75 and not the reason, because a mail server is slow."""
    monkeypatch.setattr(Messenger, "close", lambda _: signal.raise_signal(signal.SIGTERM))
    received: list[int] = []
    with handle_stop_signals(received.append):
        LaunchAlerts(TrackingConfig(), RunFolder(tmp_path)).close()
    assert received == []


def test_wandb_is_told_when_no_attempt_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an alert that opens the W&B run while the next attempt uses it, none for a run whose rank 0 was killed or
    that waits for hosts, one through another W&B run, and one that changes its name and tags, or the link `latest-run`
    to what may not be uploaded."""
    folder = RunFolder(tmp_path / "base")
    write_json(folder.provenance, {"run_id": "id7", "ancestors": [], "attempts": [{"starts_over": True}]})
    alerts = LaunchAlerts(TrackingConfig(wandb="online", alerts=AlertsConfig(wandb=True)), folder)
    with wandb_server() as server:
        server.inserted = True
        for name, value in (("WANDB_BASE_URL", server.url), ("WANDB_API_KEY", "0" * 40), ("HOME", str(tmp_path))):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("WANDB_NAME", "from-shell")
        monkeypatch.setenv("WANDB_TAGS", "from-shell")
        alerts.report(LaunchResult(Outcome.FAILED, "rank 0 hangs", Cause.HUNG), "restarting", restarting=True)
        alerts.report(LaunchResult(Outcome.FAILED, "rank 0 was killed", Cause.KILLED), "waiting for a host")
        alerts.close()
    (alert,) = server.alerts
    assert (alert["runName"], alert["projectName"]) == ("id7-2", "deepcloze")
    text = "failed: rank 0 was killed\nwaiting for a host"
    assert (alert["title"], alert["text"]) == ("crash: base", text)
    assert (server.exit_codes, server.preempting) == ([1], False)
    assert (server.names, server.tags, os.path.lexists(folder.wandb / "latest-run")) == ([], [], False)


def test_a_stopped_run_does_not_fail_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that can be resumed, but is marked as failed because no checkpoint could be written."""
    folder = RunFolder(tmp_path / "base")
    write_json(folder.provenance, {"run_id": "id7", "ancestors": [], "attempts": []})
    alerts = LaunchAlerts(TrackingConfig(wandb="online", alerts=AlertsConfig(wandb=True)), folder)
    with wandb_server() as server:
        server.inserted = True
        for name, value in (("WANDB_BASE_URL", server.url), ("WANDB_API_KEY", "0" * 40), ("HOME", str(tmp_path))):
            monkeypatch.setenv(name, value)
        alerts.report(LaunchResult(Outcome.STOPPED, "no checkpoint can be written", Cause.AGREED))
        alerts.close()
    assert [alert["title"] for alert in server.alerts] == ["crash: base"]
    assert (server.exit_codes, server.preempting) == ([75], True)


def test_a_failure_of_wandb_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Catches a launch that ends with a traceback because W&B does not answer."""
    write_json(RunFolder(tmp_path).provenance, {"run_id": "id7", "ancestors": [], "attempts": []})
    monkeypatch.setattr(alerts_module, "_WANDB_SECONDS", 0.01)
    alerts = LaunchAlerts(TrackingConfig(wandb="online", alerts=AlertsConfig(wandb=True)), RunFolder(tmp_path))
    alerts.report(LaunchResult(Outcome.FAILED, "rank 0 was killed", Cause.KILLED))
    alerts.close()
    assert "warning: the alert 'crash' could not be sent by W&B: TimeoutExpired" in capsys.readouterr().err


def test_the_reason_of_wandb_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Catches a warning that names the exception of the process that calls W&B, and not what W&B says."""
    write_json(RunFolder(tmp_path).provenance, {"run_id": "id7", "ancestors": [], "attempts": []})
    monkeypatch.setenv("WANDB_API_KEY", "short")
    alerts = LaunchAlerts(TrackingConfig(wandb="online", alerts=AlertsConfig(wandb=True)), RunFolder(tmp_path))
    alerts.report(LaunchResult(Outcome.FAILED, "rank 0 was killed", Cause.KILLED))
    alerts.close()
    assert "could not be sent by W&B: CalledProcessError: " in (shown := capsys.readouterr().err)
    assert "API key" in shown
