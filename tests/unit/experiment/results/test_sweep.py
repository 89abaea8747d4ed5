import csv
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from experiment.errors import StoppedError, UserError
from experiment.results.sweep import Result, Run, combinations, parse_grid, rank, read_metric, sweep
from experiment.run_folder import RunFolder

# A run: it appends an event with the loss it is told, waits, and says that it is done, unless it is told to fail.
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


def plan(output: Path, losses: dict[str, str], seconds: float = 0.0) -> list[Run]:
    """A run for each learning rate, with the loss that it ends at."""
    return [
        Run(
            f"lr={rate}",
            {"optimizer.lr": rate},
            [sys.executable, "-c", RUN, str(output / f"lr={rate}"), loss, str(seconds)],
            {"optimizer.lr": rate, "run.seed": 1},
        )
        for rate, loss in losses.items()
    ]


def test_a_grid_in_words() -> None:
    """Catches lists that are cut at their commas, and keys that run into each other."""
    text = "optimizer.lr=1e-4,5e-4  optimizer.betas=[0.9, 0.98],[0.9,0.999] tracking.name='a, b'"
    assert parse_grid(text) == {
        "optimizer.lr": ("1e-4", "5e-4"),
        "optimizer.betas": ("[0.9, 0.98]", "[0.9,0.999]"),
        "tracking.name": ("'a, b'",),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found nothing"),
        ("optimizer.lr", "found 'optimizer.lr'"),
        ("optimizer.lr=", "found 'optimizer.lr='"),
        ("optimizer.lr=1,,2", "found 'optimizer.lr=1,,2'"),
        ("optimizer.lr=1 optimizer.lr=2", "'optimizer.lr' is given twice"),
        ("optimizer.lr=1,2,1", "has a value twice"),
        ("a.b=[1,2 c.d=3", "']' is missing"),
        ("run.dir=a,b", "--output"),
    ],
)
def test_a_grid_that_is_none_is_refused(text: str, message: str) -> None:
    """Catches runs that are silently left out, done twice, or written over each other."""
    with pytest.raises(UserError, match="--grid") as refused:
        parse_grid(text)
    assert message in str(refused.value)


def test_every_point_has_a_folder_of_its_own() -> None:
    """Catches points that are left out, and two that share a folder."""
    points = combinations(
        {"optimizer.lr": ("1e-4", "5e-4"), "corpus.train": ("a/b", "a-b"), "a.x": ("1",), "b.x": ("2",)}
    )
    assert list(points) == [
        "lr=1e-4_train=a-b_a.x=1_b.x=2",
        "lr=1e-4_train=a-b_a.x=1_b.x=2-2",
        "lr=5e-4_train=a-b_a.x=1_b.x=2",
        "lr=5e-4_train=a-b_a.x=1_b.x=2-2",
    ]
    assert points["lr=5e-4_train=a-b_a.x=1_b.x=2-2"]["corpus.train"] == "a-b"


@pytest.mark.parametrize(("metric", "best"), [("eval/held/loss", 1.0), ("perplexity", 1.0), ("macro_f1", 3.0)])
def test_best_first(metric: str, best: float) -> None:
    """Catches a table upside down, and runs without a figure at its top."""
    run = Run("a", {}, [], {})
    results = [Result(run, "done", value) for value in (2.0, None, 3.0, 1.0)]
    ranked = [result.value for result in rank(results, metric)]
    assert (ranked[0], ranked[-1]) == (best, None)


def test_results_of_fine_tuning(tmp_path: Path) -> None:
    """Catches a comparison by another split or figure than the one asked for."""
    results = {"splits": {"validation": {"macro_f1": {"mean": 0.5}}, "test": {"macro_f1": {"mean": 0.7}}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert read_metric(RunFolder(tmp_path), "macro_f1") == 0.5
    assert read_metric(RunFolder(tmp_path), "accuracy") is None


def test_a_sweep_with_a_failure_started_twice(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a failed run that ends the others or is hidden, and finished ones that are done again."""
    runs = plan(tmp_path, {"1e-4": "4.5", "1e-3": "fail", "1e-2": "3.5"})
    with pytest.raises(SystemExit, match=r"1 of 3 runs failed: lr=1e-3"):
        sweep(runs, tmp_path, "eval/held/loss")
    said = capfd.readouterr()
    assert "[2/3] lr=1e-3: failed (exit code 1)" in said.err
    assert said.out.index("3.5000") < said.out.index("4.5000") < said.out.index("failed")
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["optimizer.lr", "eval/held/loss", "state", "folder"]
    assert [row[0] for row in rows[1:]] == ["1e-2", "1e-4", "1e-3"]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")

    repaired = plan(tmp_path, {"1e-4": "fail", "1e-3": "2.5", "1e-2": "fail", "1e-1": "6.5"})
    sweep(repaired, tmp_path, "eval/held/loss")
    assert "[1/4] lr=1e-4: finished before" in capfd.readouterr().err
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert {name: run["value"] for name, run in record["runs"].items()} == {
        "lr=1e-4": 4.5,
        "lr=1e-3": 2.5,
        "lr=1e-2": 3.5,
        "lr=1e-1": 6.5,
    }


def test_runs_of_another_config_are_not_mixed_in(tmp_path: Path) -> None:
    """Catches one table of runs that differ in more than what it says."""
    runs = plan(tmp_path, {"1e-4": "4.5"})
    sweep(runs, tmp_path, "eval/held/loss")
    other = [Run(run.name, run.values, run.argv, {**run.config, "run.seed": 2}) for run in runs]
    with pytest.raises(UserError, match=r"lr=1e-4 was begun with another run\.seed: 1, now it is 2"):
        sweep(other, tmp_path, "eval/held/loss")


def test_a_signal_stops_the_sweep_after_the_run_has_stopped(tmp_path: Path) -> None:
    """Catches a run that is left behind, and further ones that begin after Ctrl-C."""
    runs = plan(tmp_path, {"1e-4": "4.5", "1e-3": "3.5"}, seconds=60.0)

    def interrupt() -> None:
        while not RunFolder(tmp_path / "lr=1e-4").metrics.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(StoppedError, match=r"stopped at \[1/2\] lr=1e-4"):
        sweep(runs, tmp_path, "eval/held/loss")
    assert not (tmp_path / "lr=1e-3").exists()
