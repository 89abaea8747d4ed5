"""The timed all-reduce of preflight, over ranks on this machine."""

import os
import re
import subprocess
import sys
from pathlib import Path

from waiting import LIMIT

REPOSITORY = Path(__file__).resolve().parents[2]


def test_ranks_on_this_machine_are_measured(tmp_path: Path) -> None:
    """Catches ranks that do not start as those of a run do, and a result that is not found in their output."""
    environ = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launcher", "preflight", "--num_gpus=2", "--oversubscribe"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"all-reduce of \d+ MiB over 2 ranks: [\d,.]+ ms, [\d,]+ MB/s bus bandwidth", done.stdout)
    assert done.stdout.endswith("preflight: 1 of 1 host passed\n")
