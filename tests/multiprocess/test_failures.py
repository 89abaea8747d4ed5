"""A rank or one of its processes is lost: how the launch ends, and what it says."""

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from experiment.run_files.outcome_file import Outcome, read_outcome
from experiment.run_files.run_folder import RunFolder
from launches import (
    LONG,
    SLOW_STEPS,
    Start,
    config_file,
    patched,
    rank_environment,
    wait_for_exit,
    wait_for_file,
    wait_for_steps,
)
from rank_pool import RankPool, free_port
from runs import pretrain_case, soak

HOST = platform.node()


def start_training(start: Start, corpus: Path, tmp_path: Path) -> tuple[subprocess.Popen[str], psutil.Process]:
    """A launch of two ranks that has trained, and the process of rank 1."""
    config = config_file(tmp_path, corpus, schedule__steps=LONG)
    command = (sys.executable, "-m", "launcher", "pretrain", "--config", str(config), "--num_gpus=2", "--oversubscribe")
    launch = start(*command, **patched(tmp_path, SLOW_STEPS))
    wait_for_steps(tmp_path / "run", 2, launch)
    record = json.loads(RunFolder(tmp_path / "run").rank_record(1).read_text(encoding="utf-8"))
    assert (record["rank"], record["host"], record["exit"]) == (1, HOST, None)
    return launch, psutil.Process(record["pid"])


def test_the_first_failure_is_reported(start: Start, wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches rank 0's 'connection closed' in place of the failure of another rank's data worker."""
    launch, rank = start_training(start, wordpiece_corpus, tmp_path)
    worker = next(child for child in rank.children() if "pretrain.run" in " ".join(child.cmdline()))
    worker.kill()
    code, output = wait_for_exit(launch)
    assert code == 1
    outcome, message, _ = read_outcome(RunFolder(tmp_path / "run")) or (None, "", None)
    assert outcome is Outcome.FAILED
    assert message.startswith(f"{HOST}, rank 1: the data worker (pid {worker.pid}) was killed (SIGKILL)"), output
    assert f"the run failed: {message.splitlines()[0]}" in output
    log = RunFolder(tmp_path / "run").rank_log(1).read_text(encoding="utf-8")
    assert f"the data worker (pid {worker.pid}) was killed" in log


# A microbatch of more than 80 slots needs more memory than there is.
SMALL_MEMORY = """
import sys
if "pretrain.run" in sys.orig_argv:
    import torch
    from pretrain.engine.engine import Engine
    accumulate = Engine.accumulate
    def limited(self, microbatch, *arguments):
        if microbatch.input_ids.numel() > 80:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return accumulate(self, microbatch, *arguments)
    Engine.accumulate = limited
"""


def test_a_rank_out_of_memory_gets_a_smaller_microbatch(start: Start, wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches a restart that fails the same way again, or that changes the global batch."""
    config = config_file(tmp_path, wordpiece_corpus, batch__microbatch_tokens=130)
    command = (sys.executable, "-m", "launcher", "pretrain", "--config", str(config), "--max_restarts=2")
    code, output = wait_for_exit(start(*command, **patched(tmp_path, SMALL_MEMORY)))
    assert code == 0, output
    assert "OutOfMemoryError: CUDA out of memory\nrestarting, with half the microbatch" in output
    lines = (tmp_path / "run" / "launch.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line).get("cause") for line in lines] == ["out_of_memory", None]
    tree = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert (tree["batch"]["microbatch_tokens"], tree["batch"]["sequences"]) == (65, 29)


# Rank 1 cannot read the checkpoint when it first wants to.
STALE_DISK = """
import os, sys
from pathlib import Path
if "pretrain.run" in sys.orig_argv and os.environ.get("RANK") == "1":
    from experiment.errors import HostError
    from pretrain.training import checkpointer
    verify = checkpointer.verify
    def fail_once(checkpoint, *arguments):
        failed = checkpoint.parents[1] / "failed"
        if failed.exists():
            return verify(checkpoint, *arguments)
        failed.touch()
        raise HostError(f"{checkpoint} cannot be read: Stale file handle")
    checkpointer.verify = fail_once
"""


def test_a_rank_that_cannot_read_a_checkpoint_starts_again(
    start: Start, pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches a run that ends, or hangs, because a disk is away for a moment."""
    config = config_file(tmp_path, wordpiece_corpus, schedule__steps=2)
    pools[2].run(pretrain_case, yaml.safe_load(config.read_text(encoding="utf-8")))
    command = (sys.executable, "-m", "launcher", "pretrain", "--config", str(config), "--num_gpus=2", "--oversubscribe")
    again = (*command, "--schedule.steps=3", "--max_restarts=2")
    code, output = wait_for_exit(start(*again, **patched(tmp_path, STALE_DISK)))
    assert code == 0, output
    assert f"{HOST}, rank 1: {tmp_path}/run/checkpoints/step-00000002 cannot be read: Stale file handle" in output
    lines = (tmp_path / "run" / "launch.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line).get("cause") for line in lines] == ["lost_host", None]


@pytest.mark.parametrize("number", [signal.SIGTERM, None, *soak(signal.SIGINT)])
def test_a_rank_that_waits_for_another_can_be_stopped(
    start: Start, wordpiece_corpus: Path, tmp_path: Path, number: signal.Signals | None
) -> None:
    """Catches a rank that exits with 1, or not at all, if a signal or a STOP file stops it while it connects."""
    config = config_file(tmp_path, wordpiece_corpus)
    folder = RunFolder(tmp_path / "run")
    command = (sys.executable, "-m", "pretrain.run", "--config", str(config))
    rank = start(*command, **rank_environment(0, 2, free_port()))
    wait_for_file(folder.rank_record(0), rank)
    if number is None:
        folder.stop.touch()
    else:
        rank.send_signal(number)
    code, output = wait_for_exit(rank)
    assert code == 75, output
    outcome, message, _ = read_outcome(folder) or (None, "", None)
    assert outcome is Outcome.STOPPED
    reason = f"found {folder.stop}" if number is None else f"signal {number.name}"
    assert message.startswith(f"{HOST}, rank 0: {reason} before the first step")
    assert json.loads(folder.rank_record(0).read_text(encoding="utf-8"))["exit"] == 75


def test_a_signal_to_one_rank_before_the_first_step_stops_the_launch(
    start: Start, wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches exit code 1 because the other ranks lose their peer, or are stopped by DeepSpeed's launcher."""
    config = config_file(tmp_path, wordpiece_corpus, schedule__steps=LONG)
    folder = RunFolder(tmp_path / "run")
    command = (sys.executable, "-m", "launcher", "pretrain", "--config", str(config), "--num_gpus=2")
    launch = start(*command, "--oversubscribe")
    wait_for_file(folder.rank_record(1), launch)
    os.kill(json.loads(folder.rank_record(1).read_text(encoding="utf-8"))["pid"], signal.SIGTERM)
    code, output = wait_for_exit(launch)
    assert code == 75, output
