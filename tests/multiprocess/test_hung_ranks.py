"""A rank stops or makes no progress: it is named with its stack, and all ranks end."""

import json
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import psutil
import pytest

from experiment import files
from experiment.models.tensor_files import save_tensors
from experiment.run_files.checkpoints import checkpoint_path, verify
from experiment.run_files.goodput import CHECKPOINTING, STARTING, ActivityTimer, add_up, read_attempt_times
from experiment.run_files.heartbeat import main_stack
from experiment.run_files.outcome_file import Cause, Outcome, read_outcome
from experiment.run_files.run_folder import RunFolder, open_run_folder
from experiment.tracking.tracker import Trackers
from launches import Start, config_file, partly_forked, patched, wait_for_exit
from pretrain.rank_heartbeat import RankHeartbeat
from pretrain.training import checkpoint_tensors
from pretrain.world import World
from rank_pool import ForkServer, RankPool
from runs import Tree, pretrain_case, run_config
from waiting import wait_until

HOST = platform.node()
# Processes of the launch run this first: a rank is taken for hung after 8 s, but the ranks have the usual time to
# start, and time out later.
NOTICED_SOON = """
import os, signal, sys, threading, time
if "launcher" in sys.orig_argv or "pretrain.run" in sys.orig_argv:
    from experiment.run_files import heartbeat
    heartbeat._HUNG, heartbeat._BEATS = 8 / 600, 1200
"""
# Forked ranks are not in the process group of the launch, which would report that they have ended.
IN_ITS_GROUP = """
if "launcher" in sys.orig_argv:
    from unittest.mock import ANY
    os.getpgid = lambda _: ANY
"""
# Rank 1 hangs when the function that `patch` replaces is called for the given step.
HANG = """
if "pretrain.run" in sys.orig_argv and os.environ["RANK"] == "1":
    def hang():
        {how}
    {patch}
"""
AT_A_STEP = """
    from pretrain.engine.engine import Engine
    accumulate = Engine.accumulate
    def held(self, microbatch, masked, step, number):
        if step == 4:
            hang()
        return accumulate(self, microbatch, masked, step, number)
    Engine.accumulate = held
"""
IN_A_SAVE = """
    from pretrain.training import background_save
    write_share = background_save.write_share
    def held(share, partial):
        if "00000004" in partial.name:
            hang()
        return write_share(share, partial)
    background_save.write_share = held
"""
BLOCK = "threading.Event().wait(600)"
# It is continued for its stack. Any thread may write that; meanwhile the main thread stays where it is.
STOP = f"os.kill(os.getpid(), signal.SIGSTOP); {BLOCK}"


def assert_named(
    launch: "subprocess.Popen[str]", folder: RunFolder, found: str = "no sign of life", frame: str = "in held"
) -> None:
    """Rank 1 is named with its stack, and both ranks end."""
    code, output = wait_for_exit(launch)
    assert code == 1, output
    reported = read_outcome(folder)
    assert (reported.outcome, reported.cause) == (Outcome.FAILED, Cause.HUNG), output
    pids = [json.loads(folder.rank_record(rank).read_text(encoding="utf-8"))["pid"] for rank in range(2)]
    expected = f"{HOST}, rank 1 (process {pids[1]}) hangs: {found}"
    assert reported.message.startswith(expected), reported.message
    assert frame in reported.message
    assert expected in output
    assert frame in output
    assert frame in folder.rank_log(1).read_text(encoding="utf-8")
    assert re.match(r" for \d+ s", reported.message.removeprefix(expected))
    wait_until(lambda: not any(map(psutil.pid_exists, pids)))  # the fork server ends what it has forked


def start_hanging(start: Start, corpus: Path, tmp_path: Path, variables: Mapping[str, str]) -> "subprocess.Popen[str]":
    config = config_file(tmp_path, corpus, checkpoint__every_steps=2)
    command = (sys.executable, "-m", "launcher", "pretrain", "--config", str(config), "--num_gpus=2", "--oversubscribe")
    return start(*command, **variables)


def test_a_hung_rank_is_named(start: Start, wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches a launch that waits for a rank that has stopped, that does not say which one and where, or that leaves it
    behind. What it leaves on disk is that of a killed run: test_chaos.py."""
    code = NOTICED_SOON + IN_ITS_GROUP + HANG.format(how=STOP, patch=AT_A_STEP.strip())
    launch = start_hanging(start, wordpiece_corpus, tmp_path, patched(tmp_path, code))
    assert_named(launch, RunFolder(tmp_path / "run"))


@pytest.mark.soak
@pytest.mark.real_start
@pytest.mark.parametrize(
    ("how", "patch", "found", "frame"),
    [
        (STOP, AT_A_STEP, "no sign of life", "in held"),
        (BLOCK, AT_A_STEP, "no progress", "in held"),
        (STOP, IN_A_SAVE, "no sign of life", "File "),
        (BLOCK, IN_A_SAVE, "no progress", "in wait_for_all"),
    ],
)
def test_a_hung_rank_that_is_started_as_usual(
    start: Start,
    fork_server: ForkServer,
    wordpiece_corpus: Path,
    tmp_path: Path,
    how: str,
    patch: str,
    found: str,
    frame: str,
) -> None:
    """Catches the same, and a launcher that does not know its own ranks."""
    code = NOTICED_SOON + HANG.format(how=how, patch=patch.strip())
    variables = partly_forked(tmp_path, fork_server, "'launcher' in sys.orig_argv", code)
    launch = start_hanging(start, wordpiece_corpus, tmp_path, variables | patched(tmp_path, NOTICED_SOON))
    assert_named(launch, RunFolder(tmp_path / "run"), found, frame)


def slow_case(world: World, tree: Tree, hang_seconds: float) -> str:
    """A run with heartbeats whose last rank writes a checkpoint in many parts and takes longer than the timeout, and
    whose trackers wait longer than the timeout for a server when they are closed."""
    times = ActivityTimer(time.time())
    heartbeat = RankHeartbeat(RunFolder(Path(tree["run"]["dir"])), world.rank, hang_seconds)
    heartbeat.start()
    heartbeat.follow(times)
    began: list[float] = []
    close = Trackers.close

    def fsync(_: int) -> None:
        if not threading.current_thread().name.startswith("checkpoint"):
            return
        began.append(time.monotonic())
        used = time.thread_time()
        while time.thread_time() - used < 0.01:
            """Work, as a part of 64 MiB takes."""
        time.sleep(0.25 if began[-1] - began[0] < 1.2 * hang_seconds else 0.0)

    def slow_close(trackers: Trackers, outcome: Outcome, step: int) -> None:
        time.sleep(1.2 * hang_seconds)
        close(trackers, outcome, step)

    with pytest.MonkeyPatch.context() as patch:
        if world.rank == world.size - 1:
            patch.setattr(checkpoint_tensors, "save_tensors", partial(save_tensors, part_bytes=1000))
            patch.setattr(files.os, "fsync", fsync)
        patch.setattr(Trackers, "close", slow_close)
        return pretrain_case(world, tree, times=times)


def test_what_is_slow_has_not_hung(pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches a run that ends because its last checkpoint takes longer than the timeout, or W&B and alerts do."""
    folder, hang_seconds = open_run_folder(tmp_path), 5.0  # before the heartbeats begin
    tree = run_config(tmp_path, wordpiece_corpus, schedule__steps=2)
    assert pools[2].run(slow_case, tree, hang_seconds) == ["done", "done"]
    pools[2].kill()  # ends the heartbeats
    assert verify(checkpoint_path(folder.checkpoints, 2)) is None
    seconds = add_up(read_attempt_times(folder)).seconds
    assert min(seconds[CHECKPOINTING], seconds[STARTING]) > hang_seconds
    assert [main_stack(folder.rank_log(rank), 0) for rank in range(2)] == [[], []]
