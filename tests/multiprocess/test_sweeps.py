"""`deepcloze sweep` with real runs."""

import csv
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from experiment.run_files.run_folder import RunFolder
from experiment.run_files.run_lock import is_locked
from launches import Start, config_file, wait_for_exit, wait_for_steps
from runs import logged, run_config
from waiting import wait_until


@pytest.mark.soak
def test_a_sweep_of_pretrainings(wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path) -> None:
    """Catches commands that do not start, a metric that is not found in the runs, and finished runs that run again."""
    tree = run_config(tmp_path / "run", wordpiece_corpus, corpus__eval={"held": str(heldout_corpus)})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "launcher", "sweep", "--config", str(tmp_path / "run.yaml")]
    command += ["--grid", "optimizer.lr=1e-5,3e-3", "--num_gpus", "1"]
    for attempt in (1, 2):
        done = subprocess.run(command, env=os.environ | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("already finished") == 2 * (attempt - 1)
    with (tmp_path / "run-sweep" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["optimizer.lr"] for row in rows] == ["3e-3", "1e-5"]
    assert float(rows[0]["eval/held/loss"]) < float(rows[1]["eval/held/loss"])


@pytest.mark.soak
def test_a_killed_sweep_is_taken_over(start: Start, wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches a point that counts as failed because its run outlived the sweep, and one that is trained twice."""
    config = config_file(tmp_path, wordpiece_corpus)
    command = (sys.executable, "-m", "launcher", "sweep", "--config", str(config), "--num_gpus", "1")
    command += ("--grid", "optimizer.lr=1e-5", "--schedule.steps=300", "--metric=loss")
    folder = tmp_path / "run-sweep" / "lr=1e-5"
    killed = start(*command)
    wait_for_steps(folder, 2, killed)
    process = json.loads(RunFolder(folder).rank_record(0).read_text(encoding="utf-8"))["pid"]
    try:
        killed.kill()
        killed.wait()
        wait_until(lambda: not is_locked(RunFolder(folder.parent)))  # its process, which the fork server kills
        code, output = wait_for_exit(start(*command))
        assert code == 0, output
        assert f"waiting for the process that is using {folder}" in output
        assert "already finished" in output
        assert logged(folder, "step") == list(range(1, 301))
    finally:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)  # it has a session of its own
