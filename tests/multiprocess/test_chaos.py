"""A run whose processes are killed at random moments ends like one that is not disturbed."""

import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from experiment.run_files.run_folder import RunFolder
from launches import LONG, Start, config_file, wait_for_exit, wait_for_steps
from rank_pool import RankPool
from runs import evaluation_events, logged, pretrain_case, run_config, soak, step_events
from waiting import wait_until

HOST = platform.node()
_MARK = "DEEPCLOZE_TEST_CHAOS"  # in the environment of every process of a launch
_MOMENTS = ("start-up", "step", "save", "evaluation")
_VICTIMS = ("rank", "launcher", "data worker", "all")
_CHANGES = {"checkpoint__every_steps": 4, "checkpoint__keep_last": 2, "evaluation__every_steps": 3}


def marked(folder: Path) -> list[psutil.Process]:
    """The processes of this run's launches."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for_moment(moment: str, folder: Path, launch: "subprocess.Popen[str]", draw: random.Random) -> None:
    run = RunFolder(folder)
    if moment == "start-up":
        time.sleep(draw.uniform(0, 8))
        return
    wait_for_steps(folder, (len(logged(folder)) if run.metrics.exists() else 0) + draw.randrange(1, 12), launch)
    if moment == "step":
        time.sleep(draw.uniform(0, 0.2))
    elif moment == "save":
        wait_until(lambda: any(run.checkpoints.glob(".step-*.partial")), launch)
    else:
        wait_until(lambda: step_events(folder)[-1]["step"] % _CHANGES["evaluation__every_steps"] == 0, launch)


def victims(name: str, folder: Path, launch: "subprocess.Popen[str]", draw: random.Random) -> list[int]:
    """The processes to kill; all of the launch if there is none of that name yet."""
    if name == "launcher":
        return [launch.pid]
    record = RunFolder(folder).rank_record(draw.randrange(2))
    if name != "all" and record.exists():
        rank = json.loads(record.read_text(encoding="utf-8"))
        if rank["exit"] is None and psutil.pid_exists(rank["pid"]):
            if name == "rank":
                return [rank["pid"]]
            workers = [child.pid for child in psutil.Process(rank["pid"]).children()]
            if workers:
                return workers
    return [process.pid for process in marked(folder)]


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [2, *soak(25)])
def test_kills_change_nothing(
    start: Start,
    wordpiece_corpus: Path,
    heldout_corpus: Path,
    tmp_path: Path,
    pools: dict[int, RankPool],
    kills: int,
    record_property: Callable[[str, object], None],
) -> None:
    """Catches a kill that changes losses, repeats or loses a step, or leaves a process behind, and a message that does
    not say which rank was killed, on which host."""
    draw = random.Random(kills)
    folder = tmp_path / "run"
    held_out = {"corpus__eval": {"held": str(heldout_corpus)}}
    config = config_file(tmp_path, wordpiece_corpus, schedule__steps=LONG, **_CHANGES, **held_out)
    command = (sys.executable, "-m", "launcher", "pretrain", "--config", str(config), "--num_gpus=2", "--oversubscribe")
    plan = [(_MOMENTS[number % 4], _VICTIMS[number // 4 % 4]) for number in range(16)]
    slowest = 0.0  # seconds until no process was left
    for moment, name in (plan * 2)[:kills] if kills > 2 else [("save", "rank"), ("evaluation", "launcher")]:
        launch = start(*command, **{_MARK: str(folder)})
        wait_for_moment(moment, folder, launch, draw)
        killed, pids = time.monotonic(), victims(name, folder, launch, draw)
        kill(pids)
        code, output = wait_for_exit(launch)
        wait_until(lambda: not marked(folder))
        slowest = max(slowest, time.monotonic() - killed)
        assert slowest < 300  # half of the timeout of collectives; seconds on an idle machine
        assert "is damaged" not in output
        assert "skipping damaged" not in output
        if (moment, name) == ("save", "rank"):
            assert code == 1
            named = re.search(rf"rank (\d) on {re.escape(HOST)} \(process {pids[0]}\)", output)
            assert named, output
            assert f"{HOST}, rank {1 - int(named[1])}: " in output
    record_property("seconds until no process was left, at most", round(slowest, 1))

    last = start(*command, **{_MARK: str(folder)})
    wait_for_steps(folder, len(logged(folder)) + 10, last)
    (folder / "STOP").touch()
    code, output = wait_for_exit(last)
    assert code == 75, output
    steps = logged(folder, "step")
    assert steps == list(range(1, len(steps) + 1))
    undisturbed = run_config(tmp_path / "undisturbed", wordpiece_corpus, schedule__steps=LONG, **_CHANGES, **held_out)
    pools[2].run(pretrain_case, undisturbed, len(steps))
    assert logged(tmp_path / "undisturbed") == logged(folder)
    evaluated = [event["step"] for event in evaluation_events(folder)]
    due = list(range(0, steps[-1] + 1, _CHANGES["evaluation__every_steps"]))
    assert evaluated in (due, due[:-1]), "the stop may come before the last one"
    assert [event for event in evaluation_events(tmp_path / "undisturbed") if event["step"] in evaluated] == (
        evaluation_events(folder)
    )
