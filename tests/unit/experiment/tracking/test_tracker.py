import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import experiment
from experiment.run_files.outcome_file import Outcome
from experiment.run_files.run_folder import RunFolder, open_run_folder
from experiment.tracking import tracker
from experiment.tracking.alerts import Alert
from experiment.tracking.config import TrackingConfig
from experiment.tracking.tracker import TrackedRun, Tracker, Trackers, open_trackers

REPOSITORY = Path(experiment.__file__).parents[1]


def opened(folder: RunFolder, wandb: Any = "disabled", **options: Any) -> Tracker:
    options = {"total_steps": 10, "resumed_step": -1, "wandb_id": "id", "parameters": {}, **options}
    return open_trackers(TrackingConfig(wandb=wandb), folder, TrackedRun(**options))


class Broken:
    """A tracker whose methods all fail."""

    def __init__(self, *arguments: Any) -> None:
        self.tried = 0

    def log(self, metrics: Mapping[str, Any]) -> None:
        self.tried += 1
        raise OSError("disk full")

    def close(self, outcome: Outcome) -> None:
        raise OSError("disk full")


def test_an_event_reaches_the_console_and_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a tracker that is not opened, and console output on stdout, which is for results."""
    folder = open_run_folder(tmp_path)
    trackers = opened(folder)
    trackers.log({"step": 5, "loss": 1.5})
    trackers.close(Outcome.DONE)
    assert json.loads(folder.metrics.read_text()) == {"step": 5, "loss": 1.5}
    captured = capsys.readouterr()
    assert captured.err.startswith("step 5/10 · loss 1.5000")
    assert captured.out == ""


def test_a_failing_tracker_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a full disk or a closed terminal that stops a run, and a warning at every event."""
    broken = Broken()
    monkeypatch.setattr(tracker, "ConsoleTracker", lambda *arguments: broken)
    folder = open_run_folder(tmp_path)
    trackers = opened(folder)
    for step in range(3):
        trackers.log({"step": step})
    trackers.close(Outcome.FAILED)
    assert len(folder.metrics.read_text().splitlines()) == 3
    assert broken.tried == 3, "there may be room again"
    assert [record.getMessage() for record in caplog.records] == [
        "the tracker for the console failed; the run continues: OSError: disk full"
    ]


def test_each_outage_of_a_tracker_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Catches events that are lost silently the second time that the disk is full, and a warning at every event."""

    class Full(Broken):
        def log(self, metrics: Mapping[str, Any]) -> None:
            if metrics["step"] in (2, 3, 6, 7):
                super().log(metrics)

    trackers, reported = Trackers({"metrics.jsonl": Full}, ["mirror"]), []
    for step in range(1, 9):
        trackers.log({"step": step})
        if step == 2:
            trackers.alert(Alert("mirror", "no answer"))  # goes to others
        reported.append(len(caplog.records))
    assert reported == [0, 1, 1, 1, 1, 2, 2, 2]


def test_a_tracker_that_cannot_be_opened_does_not_stop_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a run that fails to start because its metrics cannot be written."""
    folder = open_run_folder(tmp_path)
    folder.metrics.mkdir()
    trackers = opened(folder)
    trackers.log({"step": 1, "loss": 2.0})
    trackers.close(Outcome.DONE)
    assert "loss 2.0000" in capsys.readouterr().err
    assert len(caplog.records) == 1
    assert "metrics.jsonl" in caplog.records[0].getMessage()


def test_a_tracker_that_cannot_be_opened_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a run without metrics because its disk was full for a moment at the start, a warning at every event, and
    events of an earlier attempt that are kept twice or lost."""
    folder = open_run_folder(tmp_path)
    aside = tmp_path / "aside"
    aside.write_text('{"step": 1}\n{"step": 2}\n')
    folder.metrics.mkdir()
    trackers = opened(folder, resumed_step=1)
    for step in (2, 3):
        trackers.log({"step": step})
    folder.metrics.rmdir()
    aside.rename(folder.metrics)
    for step in (4, 5):
        trackers.log({"step": step})
    trackers.close(Outcome.DONE)
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [1, 4, 5]
    first, last = [record.getMessage() for record in caplog.records]
    assert first.startswith("could not open the tracker for metrics.jsonl")
    assert last == "opened the tracker for metrics.jsonl at step 4; earlier events of this attempt are missing"


def test_a_tracker_may_be_opened_while_another_thread_sends() -> None:
    """Catches an alert of the mirror that ends its thread because a tracker is opened meanwhile."""
    trackers = Trackers({"a": Broken})

    class Opening(Broken):
        def log(self, metrics: Mapping[str, Any]) -> None:
            trackers._trackers["late"] = Broken()
            super().log(metrics)

    trackers._trackers["b"] = opening = Opening()
    trackers.log({"step": 1})
    assert opening.tried == 1
    assert "late" in trackers._trackers


@pytest.mark.parametrize("mode", ["online", "offline", "disabled"])
def test_wandb_is_imported_only_when_enabled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    """Catches an import of wandb, which costs half a second, in runs that do not use it."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    opened(open_run_folder(tmp_path), wandb=mode).close(Outcome.DONE)
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert bool(warned) == (mode != "disabled")
