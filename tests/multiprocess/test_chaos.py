"""A run whose processes are killed at random moments ends like one that is not disturbed."""

import itertools
import json
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from experiment.results.report.pages import write_report
from experiment.run_files.checkpoints import complete_checkpoints, read_state
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
from launches import LONG, MARK, SLOW_STEPS, Start, config_file, kill, marked, patched, wait_for_exit, wait_for_steps
from rank_pool import RankPool
from runs import evaluation_events, logged, pretrain_case, run_config, soak, step_events
from waiting import wait_until

HOST = platform.node()
_MOMENTS = ("start-up", "step", "save", "evaluation")
_VICTIMS = ("rank", "launcher", "data worker", "all")
_CHANGES = {"checkpoint__every_steps": 4, "checkpoint__keep_last": 2, "evaluation__every_steps": 3}


def wait_for_moment(
    moment: str, folder: Path, launch: "subprocess.Popen[str]", draw: random.Random, most_steps: int
) -> None:
    run = RunFolder(folder)
    if moment == "start-up":
        time.sleep(draw.uniform(0, 8))
        return
    steps = draw.randint(1, most_steps)
    wait_for_steps(folder, (len(logged(folder)) if run.metrics.exists() else 0) + steps, launch)
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


def start_of_launcher(run: RunFolder) -> float:
    """As time.time()."""
    launcher = psutil.Process(json.loads(run.owner.read_text(encoding="utf-8"))["pid"])
    since_boot = launcher.create_time() - psutil.boot_time()
    return float(time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot)


def redoes_steps(run: RunFolder) -> bool:
    """Whether the next attempt trains on steps again."""
    saved = [read_state(checkpoint)["step"] for checkpoint in complete_checkpoints(run.checkpoints)]
    return any(attempt.reached > max(saved, default=0) for attempt in read_attempt_times(run))


def check_goodput(run: RunFolder, times: Sequence[Sequence[float]], redone: bool) -> None:
    """times: of each attempt, as time.time(): its launch, the start of its launcher, and when no process was left."""
    lines = read_attempt_times(run)
    goodput, attempts = add_up(lines), last_lines(lines)
    assert len(attempts) == goodput.attempts == len(times)
    for attempt, (launched, began, ended) in zip(attempts, times, strict=True):
        assert launched - 0.01 <= attempt.start < attempt.time <= ended  # the system counts in steps of 0.01 s
        assert attempt.start < began + 0.5  # starting the ranks takes longer
        assert sum(attempt.seconds.values()) == pytest.approx(attempt.time - attempt.start, rel=0.02)
    gaps = itertools.pairwise(attempts)
    assert goodput.seconds[DOWN] == pytest.approx(sum(after.start - before.time for before, after in gaps), abs=0.1)
    assert goodput.wall_clock == pytest.approx(attempts[-1].time - attempts[0].start, abs=0.1)
    assert attempts[-1].time >= run.launches.stat().st_mtime - 0.001  # the launcher's own last line; rounded
    assert min(goodput.seconds[activity] for activity in (USEFUL, EVALUATING, CHECKPOINTING, STARTING)) > 0
    assert (goodput.seconds[REDONE] > 0) == redone
    shares = logged(run.path, "goodput")
    assert all(0 < share < 1 for share in shares)
    elapsed = goodput.seconds[USEFUL] / shares[-1]  # when it was logged; the run then saves and ends
    assert attempts[-1].start - attempts[0].start < elapsed < goodput.wall_clock + 0.1


def check_events(folder: Path, undisturbed: Path) -> None:
    steps = logged(folder, "step")
    assert steps == list(range(1, len(steps) + 1))
    assert logged(undisturbed) == logged(folder)
    evaluated = [event["step"] for event in evaluation_events(folder)]
    due = list(range(0, steps[-1] + 1, _CHANGES["evaluation__every_steps"]))
    assert evaluated in (due, due[:-1]), "the stop may come before the last one"
    expected = [event for event in evaluation_events(undisturbed) if event["step"] in evaluated]
    assert expected == evaluation_events(folder)


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
    not say which rank was killed, on which host. With few kills, also time that is lost, counted twice or called
    useful, and a report that needs a run to have ended."""
    draw, few = random.Random(kills), kills == 2
    folder = tmp_path / "run"
    run, redone = RunFolder(folder), False
    times: list[list[float]] = []  # see `check_goodput`
    held_out = {"corpus__eval": {"held": str(heldout_corpus)}}
    config = config_file(tmp_path, wordpiece_corpus, schedule__steps=LONG, **_CHANGES, **held_out)
    command = (sys.executable, "-m", "launcher", "pretrain", "--config", str(config), "--num_gpus=2", "--oversubscribe")
    plan = [(_MOMENTS[number % 4], _VICTIMS[number // 4 % 4]) for number in range(16)]
    variables = {MARK: str(folder)} | (patched(tmp_path, SLOW_STEPS) if few else {})
    slowest = 0.0  # seconds until no process was left
    for moment, name in [("save", "rank"), ("evaluation", "launcher")] if few else (plan * 2)[:kills]:
        redone |= few and redoes_steps(run)
        times.append([time.time()])
        launch = start(*command, **variables)
        if few and len(times) == 1:
            wait_for_steps(folder, 1, launch)
            assert (write_report(folder).parent / "index.html").is_file()
        wait_for_moment(moment, folder, launch, draw, most_steps=5 if few else 11)
        times[-1] += [start_of_launcher(run)] if few else []
        killed, pids = time.monotonic(), victims(name, folder, launch, draw)
        kill(pids)
        code, output = wait_for_exit(launch)
        wait_until(lambda: not marked(folder))
        times[-1].append(time.time())
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

    redone |= few and redoes_steps(run)
    times.append([time.time()])
    last = start(*command, **variables)
    wait_for_steps(folder, len(logged(folder)) + (4 if few else 10), last)
    times[-1].append(start_of_launcher(run))
    (folder / "STOP").touch()
    code, output = wait_for_exit(last)
    times[-1].append(time.time())
    assert code == 75, output
    if few:
        check_goodput(run, times, redone)
    undisturbed = run_config(tmp_path / "undisturbed", wordpiece_corpus, schedule__steps=LONG, **_CHANGES, **held_out)
    pools[2].run(pretrain_case, undisturbed, len(logged(folder)))
    check_events(folder, tmp_path / "undisturbed")
