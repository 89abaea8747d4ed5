import threading
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from experiment.errors import UserError
from experiment.run_files.metrics_file import Metrics
from experiment.run_files.outcome_file import Outcome
from experiment.run_files.run_folder import RunFolder
from experiment.tracking import alerts, tracker
from experiment.tracking.alerts import MOST_REPEAT_SECONDS, REPEAT_SECONDS, Alert, AlertFilter, Messenger
from experiment.tracking.config import AlertEvent, AlertsConfig, TrackingConfig
from experiment.tracking.notification import Message, Service
from experiment.tracking.tracker import TrackedRun, Trackers, check_tracking, open_trackers
from waiting import wait_until
from webhook_server import webhook

EVENTS: tuple[AlertEvent, ...] = ("crash", "stall", "bad_batch", "no_checkpoint", "finish")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alerts, "_RETRY_WAITS", (0.0, 0.0, 0.0))
    for name in ("HOST", "PORT", "FROM", "USER", "PASSWORD"):
        monkeypatch.delenv(f"DEEPCLOZE_SMTP_{name}", raising=False)
    for name in ("WEBHOOK_URL", "APPRISE_URLS"):
        monkeypatch.delenv(f"DEEPCLOZE_{name}", raising=False)
    for name in ("START", "LAUNCH"):
        monkeypatch.delenv(f"DEEPCLOZE_{name}", raising=False)


@pytest.fixture
def mails(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """Address, subject and text of what is mailed."""
    sent: list[tuple[str, str, str]] = []

    def service(to: str) -> Service:
        return Service("mail", lambda message: sent.append((to, message.title, message.text + message.footer)))

    monkeypatch.setattr(alerts, "mail_service", service)
    return sent


def test_an_alert_reaches_the_webhook_and_the_mailbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mails: list[tuple[str, str, str]]
) -> None:
    """Catches a channel that is not used, and a message without the run, the event or its cause."""
    warnings: list[str] = []
    with webhook() as (url, received):
        monkeypatch.setenv("DEEPCLOZE_WEBHOOK_URL", url)
        messenger = Messenger(AlertsConfig(webhook=True, email="me@x"), RunFolder(tmp_path / "base"), warnings.append)
        messenger.alert(Alert("bad_batch", "step 7: loss is NaN"))
        messenger.close()
    (payload,) = received
    assert payload["text"] == "base: bad batch\nstep 7: loss is NaN"
    assert (payload["event"], payload["message"]) == ("bad_batch", "step 7: loss is NaN")
    assert payload["run"] == str(tmp_path / "base")
    ((to, subject, text),) = mails
    assert (to, subject) == ("me@x", "base: bad batch")
    assert "step 7: loss is NaN" in text
    assert warnings == []


def test_what_cannot_be_sent_is_one_warning_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an exception that reaches training, a momentary failure that loses an alert, and the URL of the webhook,
    with which anybody can post, in a log."""
    for status, bad_url in ((500, None), (200, "http://127.0.0.1:bad/SECRET"), (200, "http://127.0.0.1:9/SECRET")):
        warnings: list[str] = []
        with webhook(status) as (url, received):
            monkeypatch.setenv("DEEPCLOZE_WEBHOOK_URL", bad_url or url)
            messenger = Messenger(AlertsConfig(webhook=True), RunFolder(tmp_path), warnings.append)
            messenger.alert(Alert("stall", "rank 1"))
            messenger.close()
        assert len(received) == (0 if bad_url else 3)
        assert len(warnings) == 1
        assert warnings[0].startswith("the alert 'stall' could not be sent by webhook: ")
        assert "SECRET" not in warnings[0]
        assert "bad" not in warnings[0]


def test_a_server_that_does_not_answer_delays_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mails: list[tuple[str, str, str]]
) -> None:
    """Catches training, the end of a run or the mail that wait for the webhook: they would wait forever here."""
    never, warnings = threading.Event(), list[str]()

    def hang(message: Message) -> None:
        never.wait()

    monkeypatch.setattr(alerts, "webhook_service", lambda: Service("webhook", hang))
    messenger = Messenger(AlertsConfig(webhook=True, email="me@x"), RunFolder(tmp_path), warnings.append)
    for _ in range(100):
        messenger.alert(Alert("crash", "…"))
    wait_until(lambda: len(mails) == 100)
    monkeypatch.setattr(alerts, "FLUSH_SECONDS", 1.0)
    messenger.close()
    never.set()
    assert warnings == ["alerts by webhook are given up: no answer in time"]


def test_repeated_alerts_are_held_back() -> None:
    """Catches a mail for each of a thousand bad batches, an alert that hides one about another event, a last message
    that is held back, and events that were not asked for."""
    now = 0.0
    passes = AlertFilter(("crash", "bad_batch"), lambda: now).filtered
    assert passes(Alert("bad_batch", "1"))
    assert passes(Alert("crash", "1"))
    now += REPEAT_SECONDS - 1
    assert not passes(Alert("bad_batch", "2"))
    assert passes(Alert("crash", "the end", repeated=False))
    assert not passes(Alert("finish", "done", repeated=False))
    now += 1
    assert passes(Alert("bad_batch", "3")) == Alert("bad_batch", "3\n1 more since the last alert")


def test_alerts_about_a_lasting_trouble_become_rare() -> None:
    """Catches a mail every ten minutes for a weekend, and a new trouble that is held back because of an old one."""
    now, sent = 0.0, list[float]()
    passes = AlertFilter(("mirror",), lambda: now).filtered
    for minute in range(0, 24 * 60, 5):
        now = 60.0 * minute
        if passes(Alert("mirror", "down")):
            sent.append(minute)
    assert sent == [0, 10, 30, 70, 150, 310, 550, 790, 1030, 1270]
    now += MOST_REPEAT_SECONDS
    assert passes(Alert("mirror", "down"))
    now += REPEAT_SECONDS
    assert passes(Alert("mirror", "down")) == Alert("mirror", "down")


def test_only_the_same_trouble_becomes_rare() -> None:
    """Catches a refused key that is not told for hours because the mirror was down before, bad batches at other steps
    that count as other troubles, and an alarm whose interval is not that of the config."""
    now = 0.0
    passes = AlertFilter(("mirror", "bad_batch", "no_checkpoint"), lambda: now).filtered
    sent: dict[str, list[float]] = {"mirror": [], "bad_batch": [], "no_checkpoint": []}
    for minute in range(0, 240, 10):
        now = 60.0 * minute
        for alert in (
            Alert("mirror", "down" if minute < 100 else "refused"),
            Alert("bad_batch", f"step {minute}: the loss is nan"),
            Alert("no_checkpoint", "no checkpoint was saved"),
        ):
            if passes(alert):
                sent[alert.event].append(minute)
    assert sent["mirror"] == [0, 10, 30, 70, 100, 110, 130, 170]
    assert sent["bad_batch"] == [0, 10, 30, 70, 150]
    assert sent["no_checkpoint"] == list(range(0, 240, 10))


def test_the_number_of_alerts_comes_before_a_log() -> None:
    """Catches a number at the end of a log, where services cut it off."""
    now = 0.0
    passes = AlertFilter(("crash",), lambda: now).filtered
    for _ in range(2):
        passes(Alert("crash", "killed\nrestarting\nthe log"))
    now = REPEAT_SECONDS
    sent = passes(Alert("crash", "killed\nrestarting\nthe log"))
    assert sent == Alert("crash", "killed\n1 more since the last alert\nrestarting\nthe log")


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (AlertsConfig(webhook=True), "DEEPCLOZE_WEBHOOK_URL"),
        (AlertsConfig(apprise=True), "DEEPCLOZE_APPRISE_URLS"),
        (AlertsConfig(email="me@x"), "DEEPCLOZE_SMTP_HOST"),
    ],
)
def test_missing_variables_are_refused(config: AlertsConfig, missing: str) -> None:
    """Catches a run of weeks whose first alert fails."""
    with pytest.raises(UserError, match=missing):
        check_tracking(TrackingConfig(alerts=config))


def test_a_url_that_is_none_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a secret in a message."""
    monkeypatch.setenv("DEEPCLOZE_WEBHOOK_URL", "hooks.example/SECRET")
    with pytest.raises(UserError) as caught:
        check_tracking(TrackingConfig(alerts=AlertsConfig(webhook=True)))
    assert "SECRET" not in str(caught.value)


def opened(tmp_path: Path, config: AlertsConfig, wandb: Literal["online", "disabled"] = "disabled") -> Trackers:
    run = TrackedRun("id", {}, total_steps=9, resumed_step=-1)
    tracking = TrackingConfig(wandb=wandb, alerts=config)
    return open_trackers(tracking, RunFolder(tmp_path / "base"), run, console=False)


@pytest.mark.parametrize(
    ("outcome", "launched", "subjects"),
    [
        (Outcome.DONE, "DEEPCLOZE_START", ["base: finish"]),
        (Outcome.STOPPED, "DEEPCLOZE_START", ["base: finish"]),
        (Outcome.FAILED, "DEEPCLOZE_START", []),  # the launcher sends it: it knows more
        (Outcome.FAILED, "DEEPCLOZE_LAUNCH", []),  # from another host
        (Outcome.FAILED, None, ["base: crash"]),
    ],
)
def test_the_end_of_a_run_is_told_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mails: list[tuple[str, str, str]],
    outcome: Outcome,
    launched: str | None,
    subjects: list[str],
) -> None:
    """Catches an end without a message, one told by both rank 0 and the launcher, and one without step and loss.

    launched: the variable of a launch that rank 0 has.
    """
    if launched is not None:
        monkeypatch.setenv(launched, "1.0")
    trackers = opened(tmp_path, AlertsConfig(email="me@x"))
    trackers.log({"step": 8, "loss": 2.5})
    trackers.log({"step": 8, "eval/docs/loss": 3.0})
    trackers.close(outcome)
    assert [subject for _, subject, _ in mails] == subjects
    assert all(f"{outcome} at step 8, loss 2.5000" in text for *_, text in mails)


@pytest.mark.parametrize("launched", ["DEEPCLOZE_START", "DEEPCLOZE_LAUNCH", None])
def test_a_crash_is_sent_by_rank_0_only_without_a_launcher(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mails: list[tuple[str, str, str]],
    launched: str | None,
) -> None:
    """Catches a crash that W&B reports twice, and again at every restart, and one that nobody reports."""
    sent_by_wandb: list[Alert] = []
    monkeypatch.setattr(WandbSpy, "sent", sent_by_wandb)
    monkeypatch.setattr(tracker, "WandbTracker", WandbSpy)
    if launched is not None:
        monkeypatch.setenv(launched, "1.0")
    trackers = opened(tmp_path, AlertsConfig(email="me@x", wandb=True), wandb="online")
    trackers.alert(Alert("bad_batch", "step 7"))
    trackers.close(Outcome.FAILED)
    events = ["bad_batch"] if launched else ["bad_batch", "crash"]
    assert [alert.event for alert in sent_by_wandb] == events
    assert len(mails) == len(events)


def test_the_end_is_of_the_last_step(tmp_path: Path, mails: list[tuple[str, str, str]]) -> None:
    """Catches the step of a late score of an earlier checkpoint, and of the last event before a stop."""
    trackers = opened(tmp_path, AlertsConfig(email="me@x"))
    trackers.log({"step": 1000, "loss": 2.5})
    trackers.log({"step": 500, "downstream/task/accuracy": 0.5})
    trackers.close(Outcome.STOPPED, step=1096)
    ((_, _, text),) = mails
    assert "stopped at step 1096, loss 2.5000" in text


class WandbSpy:
    """Stands for the tracker of W&B; keeps the alerts."""

    sent: ClassVar[list[Alert]] = []

    def __init__(self, *_: object) -> None: ...

    def alert(self, alert: Alert) -> None:
        self.sent.append(alert)

    def log(self, metrics: Metrics) -> None: ...

    def close(self, outcome: Outcome) -> None: ...


def test_only_chosen_events_are_sent(tmp_path: Path, mails: list[tuple[str, str, str]]) -> None:
    """Catches `events` without effect."""
    trackers = opened(tmp_path, AlertsConfig(email="me@x", events=("no_checkpoint",)))
    for event in EVENTS:
        trackers.alert(Alert(event, "…"))
    trackers.close(Outcome.DONE)
    assert [subject for _, subject, _ in mails] == ["base: no checkpoint"]
