import csv
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiment.errors import StoppedError, UserError
from experiment.files import write_json
from experiment.run_folder import RunFolder
from launcher import child_run
from launcher.cli import main
from launcher.sweeps import sweep as sweep_module
from launcher.sweeps.sweep import run_sweep
from launcher.sweeps.sweep_plan import SweepPlan, SweepRun
from waiting import wait_until

ROOT = Path(__file__).parents[4]

# Stands for a run: it logs an event with the given loss, sleeps and reports that it is done, or fails.
RUN = r"""
import json, sys, time
from pathlib import Path
folder, loss, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
(folder / "logs").mkdir(parents=True, exist_ok=True)
with (folder / "metrics.jsonl").open("a") as file:
    file.write(json.dumps({"step": 1, "eval/held/loss": 9.9}) + "\n")
    if loss == "fail":
        sys.exit(1)
    time.sleep(seconds)
    file.write(json.dumps({"step": 2, "eval/held/loss": float(loss)}) + "\n")
(folder / "logs" / "outcome.json").write_text(json.dumps({"outcome": "done", "message": "", "cause": None}))
"""

# Stands for a run that a killed sweep has left: when told to end, it reports {outcome}, or nothing.
LEFT = r"""
import sys, time
from pathlib import Path
from experiment.outcome_file import Outcome, write_outcome
from experiment.run_folder import open_run_folder
from experiment.run_lock import lock_run
folder = open_run_folder(sys.argv[1])
with lock_run(folder):
    (folder.path / "ready").touch()
    while not (folder.path / "end").exists():
        time.sleep(0.02)
    if sys.argv[2] != "none":
        write_outcome(folder, Outcome(sys.argv[2]))
        folder.metrics.write_text('{"step": 2, "eval/held/loss": 1.5}\n')
"""


def plan(output: Path, losses: dict[str, str], seconds: float = 0.0) -> SweepPlan:
    """One run for each learning rate; `losses` are their final losses."""
    runs = [
        SweepRun(
            f"lr={rate}",
            {"optimizer.lr": rate},
            (sys.executable, "-c", RUN, str(output / f"lr={rate}"), loss, str(seconds)),
            {"optimizer.lr": rate, "run.seed": 1},
        )
        for rate, loss in losses.items()
    ]
    return SweepPlan(tuple(runs), output, "eval/held/loss", lower_is_better=True)


def test_a_sweep_with_a_failure_run_twice(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a failed run that ends the sweep or is hidden, and finished ones that run again."""
    sweep = plan(tmp_path, {"1e-4": "4.5", "1e-3": "fail", "1e-2": "3.5"})
    with pytest.raises(SystemExit, match=r"1 of 3 runs failed: lr=1e-3"):
        run_sweep(sweep)
    said = capfd.readouterr()
    assert "[2/3] lr=1e-3: failed (exit code 1)" in said.err
    assert said.out.index("3.5000") < said.out.index("4.5000") < said.out.index("failed")
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["optimizer.lr", "eval/held/loss", "state", "folder"]
    assert [row[0] for row in rows[1:]] == ["1e-2", "1e-4", "1e-3"]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert report.index("3.5000") < report.index("4.5000") < report.index("failed")

    repaired = plan(tmp_path, {"1e-4": "fail", "1e-3": "2.5", "1e-2": "fail", "1e-1": "6.5"})
    run_sweep(repaired)
    assert "[1/4] lr=1e-4: already finished" in capfd.readouterr().err
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert {name: run["value"] for name, run in record["runs"].items()} == {
        "lr=1e-4": 4.5,
        "lr=1e-3": 2.5,
        "lr=1e-2": 3.5,
        "lr=1e-1": 6.5,
    }


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), UserError("nothing to report")])
def test_a_report_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    """Catches a sweep whose runs are all done, and that fails because of its report."""

    def fail(output: Path) -> Path:
        raise error

    monkeypatch.setattr("launcher.report.write_report", fail)
    run_sweep(plan(tmp_path, {"1e-4": "4.5"}))
    assert (
        f"warning: sweep: no report: {error}; to write it, run: deepcloze report {tmp_path}" in capsys.readouterr().err
    )
    assert (tmp_path / "sweep.csv").is_file()


def test_runs_of_another_config_are_not_mixed_in(tmp_path: Path) -> None:
    """Catches one table of runs that differ in more than its columns."""
    first = plan(tmp_path, {"1e-4": "4.5"})
    run_sweep(first)
    (run,) = first.runs
    with pytest.raises(UserError, match=r"lr=1e-4 was started with another run\.seed: 1, now 2"):
        run_sweep(replace(first, runs=(replace(run, config={**run.config, "run.seed": 2}),)))


def test_one_sweep_at_a_time_uses_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two sweeps that write one sweep.json, and a folder that stays locked after a sweep."""
    sweep = plan(tmp_path / "new", {"1e-4": "4.5"})
    refused = []

    def notify(message: str) -> None:
        if message.endswith("running"):
            with pytest.raises(UserError, match=r"^--output: another sweep is using .*new$"):
                run_sweep(sweep)
            refused.append(message)

    monkeypatch.setattr(child_run, "notify", notify)
    run_sweep(sweep)
    assert len(refused) == 1
    run_sweep(sweep)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_the_points_are_checked_exits_with_75(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Catches a queue system that does not submit a sweep again because it was stopped while it was checked."""
    monkeypatch.setattr(sweep_module, "plan_sweep", lambda _: os.kill(os.getpid(), number))
    assert main(["sweep", "--config", "run.yaml", "--grid", "run.seed=1,2"]) == 75


def test_a_signal_while_a_run_starts_reaches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that is left behind because the signal came before its process was known."""
    popen, started = subprocess.Popen, []

    def start_and_signal(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start_and_signal)
    with pytest.raises(StoppedError, match=r"stopped at \[1/1\] lr=1e-4"):
        run_sweep(plan(tmp_path, {"1e-4": "4.5"}, seconds=3600.0))
    assert started[0].poll() == -signal.SIGTERM


def test_a_signal_stops_the_sweep_after_the_run_has_stopped(tmp_path: Path) -> None:
    """Catches a run that is left behind, and others that start after Ctrl-C."""
    sweep = plan(tmp_path, {"1e-4": "4.5", "1e-3": "3.5"}, seconds=3600.0)

    def interrupt() -> None:
        wait_until(RunFolder(tmp_path / "lr=1e-4").metrics.exists)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(StoppedError, match=r"stopped at \[1/2\] lr=1e-4"):
        run_sweep(sweep)
    assert not (tmp_path / "lr=1e-3").exists()


@pytest.fixture
def left_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a process that uses the folder of the first run and ends as told, when the sweep says that it waits."""
    processes = []

    def start(outcome: str, when_waiting: Callable[[], object] | None = None) -> subprocess.Popen[bytes]:
        folder = tmp_path / "lr=1e-4"
        process = subprocess.Popen([sys.executable, "-c", LEFT, str(folder), outcome], cwd=ROOT)
        processes.append(process)
        wait_until((folder / "ready").exists, process)

        def notify(message: str) -> None:
            if "waiting for the process" in message:
                assert str(folder) in message
                (when_waiting or (folder / "end").touch)()

        monkeypatch.setattr(child_run, "notify", notify)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("outcome", "value"), [("done", 1.5), ("failed", 4.5), ("none", 4.5)])
def test_a_run_left_by_a_killed_sweep_is_taken_over(
    tmp_path: Path, left_run: Callable[..., subprocess.Popen[bytes]], outcome: str, value: float
) -> None:
    """Catches a point that counts as failed because its run still runs, and the next one started beside it."""
    process = left_run(outcome)
    run_sweep(plan(tmp_path, {"1e-4": "4.5"}))
    assert process.wait(60) == 0
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert record["runs"]["lr=1e-4"]["value"] == value, "4.5: run again"


def test_a_left_run_that_was_stopped_stops_the_sweep(
    tmp_path: Path, left_run: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """Catches a run that the user has stopped, and that the sweep starts again."""
    left_run("stopped")
    with pytest.raises(StoppedError, match=r"stopped at \[1/1\] lr=1e-4"):
        run_sweep(plan(tmp_path, {"1e-4": "4.5"}))


def test_a_signal_to_a_waiting_sweep(tmp_path: Path, left_run: Callable[..., subprocess.Popen[bytes]]) -> None:
    """Catches a waiting sweep that cannot be stopped, and a signal that reaches a run of which it knows nothing."""
    process = left_run("done", lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StoppedError, match="still runs"):
        run_sweep(plan(tmp_path, {"1e-4": "4.5"}))
    assert process.poll() is None


def test_a_full_disk_stops_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback after a run has finished, which the next attempt has to skip."""
    sweep = plan(tmp_path, {"1e-4": "4.5", "1e-3": "3.5"})
    calls = iter(range(9))

    def full(path: Path, value: object) -> None:
        if next(calls) == 1:
            raise OSError(28, "No space left on device", str(path))
        write_json(path, value)

    monkeypatch.setattr("launcher.sweeps.sweep.write_json", full)
    with pytest.raises(StoppedError, match=r"^sweep: .*sweep\.json: disk full; the same command resumes$"):
        run_sweep(sweep)
    run_sweep(sweep)
    lines = (tmp_path / "lr=1e-4" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2, "the finished run is skipped"
