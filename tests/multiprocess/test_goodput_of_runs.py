"""How runs that are killed, stopped and resumed have spent their time."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from experiment.results.report import write_report
from experiment.run_files.goodput import (
    CHECKPOINTING,
    DOWN,
    EVALUATING,
    REDONE,
    STARTING,
    USEFUL,
    add_up,
    last_lines,
    read_attempt_times,
)
from experiment.run_files.run_folder import RunFolder
from launches import LONG, Start, config_file, wait_for_exit, wait_for_steps
from rank_pool import ForkServer
from runs import logged


def start_of(pid: int) -> float:
    """When a process started, as time.time()."""
    since_boot = psutil.Process(pid).create_time() - psutil.boot_time()
    return float(time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot)


def test_the_time_of_an_interrupted_run_adds_up(
    start: Start, fork_server: ForkServer, wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path
) -> None:
    """Catches time that is lost, counted twice or called useful in a run with two kills, evaluations and a stop, and a
    report that needs a run to have ended."""
    folder = RunFolder(tmp_path / "run")
    changes = {"corpus__eval": {"held": str(heldout_corpus)}, "evaluation__every_steps": 10}
    config = config_file(tmp_path, wordpiece_corpus, schedule__steps=LONG, checkpoint__every_steps=10, **changes)
    deepcloze = str(Path(sys.executable).with_name("deepcloze"))
    launched, began, ended = [], [], []
    fork_server.wait_until_ready()

    def launch() -> "subprocess.Popen[str]":
        launched.append(time.time())
        reached = len(logged(folder.path)) if folder.metrics.exists() else 0
        process = start(deepcloze, "pretrain", "--config", str(config))
        wait_for_steps(folder.path, reached // 10 * 10 + 18, process)
        began.append(start_of(json.loads(folder.owner.read_text(encoding="utf-8"))["pid"]))
        return process

    killed_rank = launch()
    assert (write_report(folder.path).parent / "index.html").is_file()
    os.kill(json.loads(folder.rank_record(0).read_text(encoding="utf-8"))["pid"], signal.SIGKILL)
    assert wait_for_exit(killed_rank)[0] == 1
    ended.append(time.time())
    killed_launcher = launch()
    killed_launcher.kill()
    wait_for_exit(killed_launcher)
    ended.append(time.time())
    stopped = launch()
    stopped.send_signal(signal.SIGTERM)
    assert wait_for_exit(stopped)[0] == 75
    ended.append(time.time())

    lines = read_attempt_times(folder)
    goodput, attempts = add_up(lines), last_lines(lines)
    assert len(attempts) == goodput.attempts == 3
    for attempt, launch_time, begin, end in zip(attempts, launched, began, ended, strict=True):
        assert launch_time - 0.01 <= attempt.start < attempt.time <= end  # the system counts in steps of 0.01 s
        assert attempt.start < begin + 0.5  # starting the ranks takes longer
        assert sum(attempt.seconds.values()) == pytest.approx(attempt.time - attempt.start, rel=0.02)
    gaps = itertools.pairwise(attempts)
    assert goodput.seconds[DOWN] == pytest.approx(sum(after.start - before.time for before, after in gaps), abs=0.1)
    assert goodput.wall_clock == pytest.approx(attempts[-1].time - attempts[0].start, abs=0.1)
    assert attempts[-1].time >= folder.launches.stat().st_mtime - 0.001  # the launcher's own last line; rounded
    assert min(goodput.seconds[activity] for activity in (USEFUL, REDONE, EVALUATING, CHECKPOINTING, STARTING)) > 0
    shares = logged(folder.path, "goodput")
    assert all(0 < share < 1 for share in shares)
    elapsed = goodput.seconds[USEFUL] / shares[-1]  # when it was logged; the run then saves and ends
    assert attempts[-1].start - attempts[0].start < elapsed < goodput.wall_clock + 0.1
