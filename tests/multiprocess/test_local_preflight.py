"""The timed all-reduce of preflight, over ranks on this machine."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from launcher.preflight import measure
from pretrain.world import World
from rank_pool import RankPool
from waiting import LIMIT


def test_ranks_on_this_machine_are_measured(tmp_path: Path, handed_over: Mapping[str, str]) -> None:
    """Catches ranks that do not start as those of a run do, and a result that is not found in their output."""
    environ = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | handed_over
    command = [sys.executable, "-m", "launcher", "preflight", "--num_gpus=2", "--oversubscribe"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"all-reduce of \d+ MiB over 2 ranks: [\d,.]+ ms, [\d,]+ MB/s bus bandwidth", done.stdout)
    assert done.stdout.endswith("preflight: 1 of 1 host passed\n")


def link_case(world: World) -> float:
    """The bandwidth between two ranks, the second of which always measures too long a time."""
    elapsed = measure._seconds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_seconds", lambda work, device: elapsed(work, device) + 5.0 * world.rank)
        return measure._link_bandwidth([0, 1], world, torch.device("cpu"))


def test_both_ends_of_a_link_have_the_same_bandwidth(pools: dict[int, RankPool]) -> None:
    """Catches one of two hosts that is reported as far slower than the other, because it was busy for a moment."""
    first, second = pools[2].run(link_case)
    assert first == second > 0
