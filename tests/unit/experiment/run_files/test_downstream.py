"""Results of `deepcloze watch`, logged by the process that writes the metrics."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiment.run_files import downstream
from experiment.run_files.downstream import DownstreamLog, DownstreamResult, drop_results, read_results, write_result
from experiment.run_files.metrics_file import JsonlTracker, read_events
from experiment.run_files.run_folder import RunFolder, open_run_folder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return open_run_folder(tmp_path / "run")


def result(step: int, value: float = 0.5, task: str = "toy") -> DownstreamResult:
    return DownstreamResult(step, task, "accuracy", False, {"accuracy": value, "macro_f1": value}, "w", "c", 1.0)


def event(step: int, value: float = 0.5, task: str = "toy") -> dict[str, float]:
    return {"step": step, f"downstream/{task}/accuracy": value, f"downstream/{task}/macro_f1": value}


def test_each_result_is_logged_once_and_not_before_its_step(run: RunFolder) -> None:
    """Catches a curve with points twice, in any order, or of steps that the run has not reached."""
    log = DownstreamLog(run)
    assert log.take_new(100) == []
    for step in (200, 100, 300):
        write_result(run, result(step))
    write_result(run, result(100, task="other"))
    assert log.take_new(250) == [event(100, task="other"), event(100), event(200)]
    assert log.take_new(250) == []
    assert log.take_new(300) == [event(300)]


def test_a_resumed_run_logs_what_it_has_dropped(run: RunFolder) -> None:
    """Catches scores lost by a resume, and those of earlier steps logged twice."""
    for step in (100, 200):
        write_result(run, result(step))
    tracker = JsonlTracker(run.metrics, -1)
    tracker.log({"step": 250, "loss": 1.0})
    for found in DownstreamLog(run).take_new(250):
        tracker.log(found)  # later than the event of a later step
    tracker = JsonlTracker(run.metrics, resumed_step=150)
    assert read_events(run.metrics) == [event(100)]
    log = DownstreamLog(run)
    assert log.take_new(160) == []
    assert log.take_new(200) == [event(200)]


def test_results_are_parsed_once(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a page that reads every result each two seconds, and a result that stays unknown after a disk did not
    answer for a moment."""
    parse, tries = downstream.parse_record, list[int]()

    def parse_later(*arguments: Any) -> Any:
        tries.append(1)
        if len(tries) == 1:
            raise OSError("no answer")
        return parse(*arguments)

    monkeypatch.setattr(downstream, "parse_record", parse_later)
    write_result(run, result(100))
    assert [read_results(run) for _ in range(3)] == [[], [result(100)], [result(100)]]
    assert len(tries) == 2
    write_result(run, result(100, 0.75))
    assert read_results(run) == [result(100, 0.75)]


def test_a_replaced_result_is_logged_again(run: RunFolder) -> None:
    """Catches the score of a checkpoint that no longer exists staying in the curve."""
    write_result(run, result(100))
    log = DownstreamLog(run)
    assert log.take_new(100) == [event(100)]
    write_result(run, result(100, 0.75))
    os.utime(run.downstream / "toy" / "step-00000100.json", ns=(1, 1))  # a clock that has few digits
    assert log.take_new(100) == [event(100, 0.75)]


def test_results_of_abandoned_weights_are_dropped(run: RunFolder) -> None:
    """Catches scores of steps before a run was rewound, logged as those of the weights that it trains then."""
    for step in (200, 300, 400):
        write_result(run, result(step))
    write_result(run, result(300, task="other"))
    drop_results(run, 200)
    assert DownstreamLog(run).take_new(1000) == [event(200)]
    assert read_results(run) == [result(200)]


def test_damaged_and_foreign_files_are_skipped(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a pretraining run that stops because of a file of another command."""
    write_result(run, result(100))
    folder = run.downstream / "toy"
    for name, text in (("step-00000200.json", "{"), ("step-00000300.json", '{"step": 300}'), ("step-x.json", "{}")):
        (folder / name).write_text(text)
    written = (folder / "step-00000100.json").read_text()
    for step, (before, after) in enumerate((("0.5", "[0.5]"), ('"accuracy": ', '"f1": '), ("100", "[100]")), start=400):
        (folder / f"step-{step:08d}.json").write_text(written.replace(before, after))
    assert DownstreamLog(run).take_new(1000) == [event(100)]
    assert read_results(run) == [result(100)]
    assert "step-00000200.json" in caplog.text


def test_an_unreadable_folder_is_a_warning(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a pretraining run that stops because a shared disk does not answer for a moment."""
    write_result(run, result(100))
    log = DownstreamLog(run)

    def fail(*_: object, **__: object) -> None:
        raise OSError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", fail)
        assert log.take_new(100) == []
    assert "no answer" in caplog.text
    assert log.take_new(100) == [event(100)]


def test_files_that_have_not_changed_are_not_looked_at(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches thousands of files whose times are read at every log event of a long run, and a result that is missed."""
    now = time.time_ns()
    for step in (100, 200):
        write_result(run, result(step))
    log, looked = DownstreamLog(run), list[Path]()

    def look(folder: Path) -> Iterator[tuple[Path, int]]:
        looked.append(folder)
        return files(folder)

    files = downstream._files
    monkeypatch.setattr(downstream, "_files", look)
    assert log.take_new(100) == [event(100)]
    os.utime(run.downstream / "toy", ns=(now, now - 3_000_000_000))
    assert log.take_new(150) == []
    assert log.take_new(200) == [event(200)], "it was too late before"
    assert len(looked) == 3
    assert log.take_new(300) == []
    assert len(looked) == 3
    write_result(run, result(300))
    assert log.take_new(300) == [event(300)]
