"""`deepcloze sweep` with real runs."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from runs import run_config


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
