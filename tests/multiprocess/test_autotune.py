"""`deepcloze pretrain --autotune` with real ranks, one of which runs out of memory with large microbatches."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from experiment.run_files.checkpoints import checkpoint_path
from experiment.run_files.run_folder import RunFolder
from launches import Start, config_file, partly_forked, patched, wait_for_exit, wait_for_file
from rank_pool import ForkServer, RankPool
from runs import NO_DROPOUT, TINY, logged, pretrain_case, run_config
from waiting import wait_until

# Each process runs this first: rank 1 has memory for microbatches of up to 300 tokens.
PATCH = """
import os, sys

if "pretrain.run" in sys.orig_argv:
    import torch
    from pretrain.engine.engine import Engine
    original = Engine.accumulate
    def accumulate(self, microbatch, *others):
        if os.environ["RANK"] == "1" and microbatch[0].numel() > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, microbatch, *others)
    Engine.accumulate = accumulate
else:
    from launcher import autotune
    autotune.LIMIT_SECONDS = 3600.0
"""


def start_autotune(start: Start, tmp_path: Path, config: Path, *overrides: str) -> "subprocess.Popen[str]":
    """With 2 ranks, of which the second one has memory for microbatches of up to 300 tokens."""
    command = (sys.executable, "-m", "launcher", "pretrain", "--config", str(config), "--num_gpus=2", "--oversubscribe")
    return start(*command, "--autotune", *overrides, **patched(tmp_path, PATCH))


@pytest.mark.soak
def test_a_microbatch_that_fits_is_found(
    start: Start, wordpiece_corpus: Path, tmp_path: Path, pools: dict[int, RankPool]
) -> None:
    """Catches a choice that does not fit or does not reach the run, a trial that leaves something behind, and other
    results than without."""
    changes = {"model__config": TINY | NO_DROPOUT, "batch__sequences": 116, "batch__microbatch_tokens": 520}
    config = config_file(tmp_path, wordpiece_corpus, **changes)
    code, output = wait_for_exit(start_autotune(start, tmp_path, config))
    assert code == 0, output
    assert "out of memory" in output
    assert "Traceback" not in output
    folder = RunFolder(tmp_path / "run")
    chosen = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    assert chosen["batch"]["microbatch_tokens"] in (130, 260)
    assert chosen["run"]["dir"] == str(folder.path)
    assert not (folder.logs / "autotune").exists()
    assert len(folder.launches.read_text(encoding="utf-8").splitlines()) == 1
    plain = run_config(tmp_path / "plain", wordpiece_corpus, **changes)
    pools[2].run(pretrain_case, plain)
    assert logged(folder.path) == pytest.approx(logged(tmp_path / "plain"), rel=1e-5)


@pytest.mark.soak
def test_a_resumed_run_with_stages_is_tuned(
    start: Start, wordpiece_corpus: Path, tmp_path: Path, pools: dict[int, RankPool]
) -> None:
    """Catches trials that resume or need the model that the run began with, a resume that begins anew, and a stage that
    keeps its microbatch."""
    pools[2].run(pretrain_case, run_config(tmp_path / "first", wordpiece_corpus, schedule__steps=1))
    model = checkpoint_path(tmp_path / "first" / "checkpoints", 1) / "hf"
    stages = [{"steps": 3, "max_seq_length": 20, "microbatch_tokens": 60}, {}]
    changes = {"schedule__stages": stages, "batch__microbatch_tokens": 120}
    changes |= {"model__config": None, "model__init_from": str(model)}
    pools[2].run(pretrain_case, run_config(tmp_path / "run", wordpiece_corpus, **changes))
    shutil.rmtree(model)
    config = config_file(tmp_path, wordpiece_corpus, **changes)
    code, output = wait_for_exit(start_autotune(start, tmp_path, config, "--schedule.steps=8"))
    assert code == 0, output
    assert "chosen" in output
    assert logged(tmp_path / "run", "step") == [1, 2, 3, 4, 5, 6, 7, 8]
    resumed = yaml.safe_load(RunFolder(tmp_path / "run").config.read_text(encoding="utf-8"))
    sizes = [stage["microbatch_tokens"] for stage in resumed["schedule"]["stages"]]
    assert sizes[1] in (None, resumed["batch"]["microbatch_tokens"])
    assert resumed["batch"]["microbatch_tokens"] == 2 * sizes[0]


@pytest.mark.soak
@pytest.mark.real_start  # forked ranks outlive the kill of their group for a moment, and write to their folder
def test_a_signal_ends_the_trials(
    start: Start, fork_server: ForkServer, wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches ranks of a trial that outlive the command, a run that starts nevertheless, and a wrong exit code."""
    config = config_file(tmp_path, wordpiece_corpus, batch__microbatch_tokens=130)
    command = (sys.executable, "-m", "launcher", "pretrain", "--config", str(config), "--num_gpus=1", "--autotune")
    launch = start(*command, **partly_forked(tmp_path, fork_server, "'launcher' in sys.orig_argv"))
    folder = RunFolder(tmp_path / "run")
    trial = RunFolder(folder.logs / "autotune" / "130")
    wait_for_file(trial.rank_record(0), launch)
    rank = psutil.Process(json.loads(trial.rank_record(0).read_text(encoding="utf-8"))["pid"])
    launch.send_signal(signal.SIGTERM)
    code, output = wait_for_exit(launch)
    assert code == 75, output
    assert "Traceback" not in output
    wait_until(lambda: not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE)
    assert not (folder.logs / "autotune").exists()
    assert not folder.metrics.exists()
