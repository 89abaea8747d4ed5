"""Whole runs as users start them: `deepspeed` and `deepcloze`."""

import json
import signal
import sys
from pathlib import Path

import pytest

from experiment.files import REPOSITORY
from experiment.run_files.checkpoints import checkpoint_path, complete_checkpoints
from experiment.run_files.outcome_file import Cause, Outcome, read_outcome
from experiment.run_files.run_folder import RunFolder
from launches import LONG, SLOW_STEPS, Start, config_file, partly_forked, patched, wait_for_exit, wait_for_steps
from rank_pool import ForkServer, RankPool, free_port
from runs import NO_DROPOUT, SHALLOW, logged, pretrain_case, run_config, sampled


@pytest.mark.real_start
@pytest.mark.parametrize("ranks", sampled((1, 2), {1}))
def test_deepspeeds_own_launcher_gives_the_same_run(
    start: Start,
    fork_server: ForkServer,
    wordpiece_corpus: Path,
    tmp_path: Path,
    pools: dict[int, RankPool],
    ranks: int,
) -> None:
    """Catches a run.py that only deepcloze can start: its imports, --local_rank, the environment of ranks."""
    changes = {"model__config": SHALLOW | NO_DROPOUT, "schedule__steps": 2}
    config = config_file(tmp_path, wordpiece_corpus, **changes)
    deepspeed = (sys.executable, "-m", "deepspeed.launcher.runner")  # as the program `deepspeed`
    flags = (f"--num_gpus={ranks}", f"--master_port={free_port()}", str(REPOSITORY / "pretrain" / "run.py"))
    ranks_start = partly_forked(tmp_path, fork_server, "'RANK' not in os.environ")
    code, output = wait_for_exit(start(*deepspeed, *flags, "--config", str(config), **ranks_start))
    assert code == 0, output
    pools[ranks].run(pretrain_case, run_config(tmp_path / "pooled", wordpiece_corpus, **changes))
    assert logged(tmp_path / "run", "step") == [1, 2]
    assert logged(tmp_path / "run") == logged(tmp_path / "pooled")


def test_sigterm_saves_and_the_same_command_resumes(start: Start, wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches a signal that loses steps, a wrong exit code, and a restart from step 0."""
    config = config_file(tmp_path, wordpiece_corpus, ds_config="bf16_zero2", schedule__steps=LONG)
    command = (str(Path(sys.executable).with_name("deepcloze")), "pretrain", "--config", str(config), "--num_gpus", "1")
    process = start(*command, **patched(tmp_path, SLOW_STEPS))
    wait_for_steps(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGTERM)
    code, output = wait_for_exit(process)
    assert code == 75, output
    assert "Traceback" not in output
    reason = "stopped: the launcher got SIGTERM; run the same command again to resume"
    assert read_outcome(RunFolder(tmp_path / "run")) == (Outcome.STOPPED, reason, Cause.SIGNAL)
    assert f"deepcloze: {reason}\n" in output
    steps = logged(tmp_path / "run", "step")
    saved = checkpoint_path(tmp_path / "run" / "checkpoints", steps[-1])
    assert complete_checkpoints(saved.parent) == [saved]
    assert not (tmp_path / "run" / "STOP").exists()

    resumed = start(*command, f"--schedule.steps={steps[-1] + 2}")
    code, output = wait_for_exit(resumed)
    assert code == 0, output
    assert f"resuming from {saved}" in output
    assert f"schedule.steps: {LONG} -> {steps[-1] + 2}" in output
    assert logged(tmp_path / "run", "step") == list(range(1, steps[-1] + 3))
    launches = (tmp_path / "run" / "launch.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["outcome"] for line in launches] == ["stopped", "done"]


def test_a_run_rejected_by_the_ranks_exits_with_2(start: Start, wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches errors of rank 0 that the other ranks turn into a failure with a traceback."""
    config = config_file(tmp_path, wordpiece_corpus)
    RunFolder(tmp_path / "run").metrics.parent.mkdir()
    RunFolder(tmp_path / "run").provenance.touch()
    RunFolder(tmp_path / "run").metrics.write_text('{"step": 1, "loss": 5.0}\n')
    command = (str(Path(sys.executable).with_name("deepcloze")), "pretrain", "--config", str(config), "--num_gpus", "2")
    code, output = wait_for_exit(start(*command, "--oversubscribe", "--run.resume=never"))
    assert code == 2, output
    assert "Traceback" not in output
    assert output.count("run.resume is 'never'") == 1
