"""A warning of a batch system, SIGUSR1 or SIGUSR2, that one process of a run gets at any time."""

import platform
import signal
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from experiment.run_files.checkpoints import checkpoint_path, complete_checkpoints
from experiment.run_files.outcome_file import Cause, Outcome, read_outcome
from experiment.run_files.run_folder import RunFolder
from launches import LONG, Start, config_file, patched, wait_for_exit, wait_for_steps
from rank_pool import ForkServer
from runs import logged, soak
from waiting import wait_until

HOST = platform.node()

# Each process runs this first: rank 1 signals itself where `patch` says.
SIGNAL = """
import os, signal, sys, time
def signal_once(number=signal.SIGUSR1):
    global signal_once
    signal_once = lambda *_: None
    os.kill(os.getpid(), number)
def before(owner, name, is_due=lambda *_: True, act=lambda: signal_once()):
    original = getattr(owner, name)
    def call(*arguments, **options):
        if is_due(*arguments):
            act()
        return original(*arguments, **options)
    setattr(owner, name, call)
def signal_again_and_again():
    while True:
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(0.2)
if "pretrain.run" in sys.orig_argv and os.environ.get("RANK") == "1":
    {patch}
"""
IN_A_SAVE = (
    "from pretrain.training import background_save; "
    'before(background_save, "write_share", lambda _, path: "00000004" in path.name)'
)
IN_AN_EVALUATION = (
    "from pretrain.evaluate import HeldOutEvaluator; from itertools import count; numbers = count(); "
    "before(HeldOutEvaluator, 'metrics', lambda *_: next(numbers) == 1)"  # after step 3
)
IN_A_STEP = "from pretrain.engine.engine import Engine; before(Engine, 'step')"
WHILE_IT_IMPORTS = "signal_once()"
WHILE_IT_BUILDS = "from pretrain import preparation; before(preparation, 'build_model')"
TWICE = "from pretrain.engine.engine import Engine; before(Engine, 'step', act=signal_again_and_again)"


def launch(start: Start, corpus: Path, held_out: Path, tmp_path: Path, patch: str) -> tuple[int, str]:
    config = config_file(
        tmp_path,
        corpus,
        schedule__steps=LONG,
        checkpoint__every_steps=2,
        corpus__eval={"held-out": str(held_out)},
        evaluation__every_steps=3,
    )
    command = (sys.executable, "-m", "launcher", "pretrain", "--config", str(config), "--num_gpus=2", "--oversubscribe")
    return wait_for_exit(start(*command, **patched(tmp_path, SIGNAL.format(patch=patch))))


@pytest.mark.parametrize("patch", [IN_A_SAVE, *soak(IN_AN_EVALUATION, IN_A_STEP)])
def test_a_warning_to_one_rank_saves_a_checkpoint(
    start: Start, wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path, patch: str
) -> None:
    """Catches a rank that SIGUSR1 kills, and a run that continues or loses the step when one rank alone is warned."""
    code, output = launch(start, wordpiece_corpus, heldout_corpus, tmp_path, patch)
    assert code == 75, output
    reason = f"stopped: {HOST}, rank 1: signal SIGUSR1; run the same command again to resume"
    folder = RunFolder(tmp_path / "run")
    assert read_outcome(folder) == (Outcome.STOPPED, reason, Cause.SIGNAL)
    last = logged(folder.path, "step")[-1]
    assert complete_checkpoints(folder.checkpoints)[-1] == checkpoint_path(folder.checkpoints, last)


@pytest.mark.soak
@pytest.mark.parametrize("patch", [WHILE_IT_IMPORTS, WHILE_IT_BUILDS])
def test_a_warning_to_one_rank_that_starts_stops_the_run(
    start: Start, wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path, patch: str
) -> None:
    """Catches a failure, or a warning that is lost, because the rank does not train yet."""
    code, output = launch(start, wordpiece_corpus, heldout_corpus, tmp_path, patch)
    assert code == 75, output
    assert f"{HOST}, rank 1: signal SIGUSR1 before the first step" in output


@pytest.mark.soak
def test_a_second_signal_to_one_rank_ends_all(
    start: Start, wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path
) -> None:
    """Catches ranks that stay when one of them has been told to end at once, and the wrong exit code."""
    code, output = launch(start, wordpiece_corpus, heldout_corpus, tmp_path, TWICE)
    assert code == 75, output
    assert f"{HOST}, rank 1: a second signal, SIGUSR2; run the same command again to resume" in output


@pytest.mark.soak
@pytest.mark.real_start
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_all_processes_saves_a_checkpoint(
    start: Start, fork_server: ForkServer, wordpiece_corpus: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Catches a launcher of DeepSpeed or a data worker that dies because a batch system signals all of a job, and a
    run that does not resume after it."""
    config = config_file(tmp_path, wordpiece_corpus, schedule__steps=LONG)
    command = (sys.executable, "-m", "launcher", "pretrain", "--config", str(config), "--num_gpus=2", "--oversubscribe")
    process = start(*command)
    wait_for_steps(tmp_path / "run", 3, process)
    started = psutil.Process(process.pid)
    for one in [*started.children(recursive=True), started]:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(number)
    code, output = wait_for_exit(process)
    assert code == 75, output
    folder = RunFolder(tmp_path / "run")
    last = logged(folder.path, "step")[-1]
    saved = complete_checkpoints(folder.checkpoints)[-1]
    assert saved == checkpoint_path(folder.checkpoints, last)
    wait_until(lambda: started.pid not in psutil.pids())
    resumed = start(*command, **fork_server.environment())
    wait_for_steps(folder.path, last + 2, resumed)
    folder.stop.touch()
    code, output = wait_for_exit(resumed)
    assert code == 75, output
    assert f"resuming from {saved}" in output
    assert logged(folder.path, "step") == list(range(1, len(logged(folder.path, "step")) + 1))
