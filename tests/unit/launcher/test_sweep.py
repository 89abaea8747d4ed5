import csv
import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from experiment.errors import StoppedError, UserError
from experiment.run_folder import RunFolder
from launcher.sweep import run_sweep
from launcher.sweep_plan import SweepPlan, SweepRun

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
(folder / "logs" / "outcome.json").write_text(json.dumps({"outcome": "done", "message": ""}))
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
    return SweepPlan(tuple(runs), output, "eval/held/loss")


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


def test_runs_of_another_config_are_not_mixed_in(tmp_path: Path) -> None:
    """Catches one table of runs that differ in more than its columns."""
    first = plan(tmp_path, {"1e-4": "4.5"})
    run_sweep(first)
    (run,) = first.runs
    with pytest.raises(UserError, match=r"lr=1e-4 was started with another run\.seed: 1, now 2"):
        run_sweep(replace(first, runs=(replace(run, config={**run.config, "run.seed": 2}),)))


def test_a_signal_stops_the_sweep_after_the_run_has_stopped(tmp_path: Path) -> None:
    """Catches a run that is left behind, and others that start after Ctrl-C."""
    sweep = plan(tmp_path, {"1e-4": "4.5", "1e-3": "3.5"}, seconds=3600.0)

    def interrupt() -> None:
        while not RunFolder(tmp_path / "lr=1e-4").metrics.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(StoppedError, match=r"stopped at \[1/2\] lr=1e-4"):
        run_sweep(sweep)
    assert not (tmp_path / "lr=1e-3").exists()
