import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiment.process.own_process import START_VARIABLE
from experiment.run_files import goodput
from experiment.run_files.goodput import (
    ACTIVITIES,
    CHECKPOINTING,
    COMPILING,
    DATA,
    DOWN,
    EVALUATING,
    REDONE,
    STARTING,
    TRAINING,
    USEFUL,
    ActivityTimer,
    AttemptTime,
    add_up,
    attempt_start,
    last_lines,
    process_start,
    reached_checkpoints,
    read_attempt_times,
    record_end,
)
from experiment.run_files.run_folder import RunFolder, open_run_folder


class Clock:
    """Wall clock, monotonic clock and the time spent on compiling, moved by the test."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.compiled = 0.0

    def timer(self, start: float) -> ActivityTimer:
        return ActivityTimer(start, lambda: self.compiled, clock=lambda: self.now - 500, now=lambda: self.now)

    def begin(
        self, folder: RunFolder, step: int = 0, total_steps: int | None = None, start: float | None = None
    ) -> ActivityTimer:
        """The timer of an attempt that begins to train. start: default: now."""
        timer = self.timer(self.now if start is None else start)
        timer.open(folder, step=step, total_steps=total_steps)
        timer.begin_training()
        return timer

    def pass_seconds(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return open_run_folder(tmp_path / "run")


def train(timer: ActivityTimer, clock: Clock, first: int, last: int, log_every: int = 1) -> None:
    """Steps of three seconds, of which one is spent waiting for data."""
    for step in range(first, last + 1):
        with timer.during(DATA, recorded=False):
            clock.pass_seconds(1)
        clock.pass_seconds(2)
        timer.finish_step(step)
        if step % log_every == 0:
            timer.record()


def spent(folder: RunFolder) -> dict[str, float]:
    """Seconds by activity, without those that took none."""
    goodput = add_up(read_attempt_times(folder))
    assert set(goodput.seconds) == set(ACTIVITIES)
    return {activity: seconds for activity, seconds in goodput.seconds.items() if seconds}


def test_every_second_is_counted_once(clock: Clock, folder: RunFolder) -> None:
    """Catches time that is lost or counted twice where activities are nested, and compiling counted as training."""
    timer = clock.timer(start=990.0)
    timer.open(folder, step=0, total_steps=10)
    clock.pass_seconds(5)
    timer.begin_training()
    with timer.during(EVALUATING):
        clock.pass_seconds(7)
    train(timer, clock, 1, 4)
    clock.pass_seconds(20)
    clock.compiled += 16.0
    timer.finish_step(5)
    with timer.during(CHECKPOINTING):
        clock.pass_seconds(3)
    assert spent(folder) == {
        STARTING: 15.0,
        EVALUATING: 7.0,
        USEFUL: 12.0,
        COMPILING: 16.0,
        DATA: 4.0,
        CHECKPOINTING: 3.0,
    }
    assert timer.goodput == pytest.approx(12 / 57)


def test_steps_after_a_kill_are_redone_and_the_time_between_is_down(clock: Clock, folder: RunFolder) -> None:
    """Catches steps that count as useful twice, and a kill that loses more than one logging interval."""
    first = clock.begin(folder, total_steps=100)
    train(first, clock, 1, 25, log_every=10)  # killed: steps 21 to 25 are not recorded
    clock.pass_seconds(40)
    second = clock.begin(folder, step=10, total_steps=100)
    train(second, clock, 11, 30, log_every=10)
    assert spent(folder) == {USEFUL: 2 * 20.0 + 2 * 10, REDONE: 2 * 10.0, DATA: 40.0, DOWN: 5 * 3 + 40.0}
    goodput = add_up(read_attempt_times(folder))
    assert (goodput.attempts, goodput.wall_clock) == (2, clock.now - 1000)


def test_the_end_of_the_processes_is_counted(clock: Clock, folder: RunFolder) -> None:
    """Catches seconds between the last line and the end of the processes that are in no activity: here 12 %."""
    timer = clock.begin(folder, total_steps=5, start=990.0)
    train(timer, clock, 1, 2)
    timer.end_training()
    clock.pass_seconds(1)
    timer.record()
    clock.pass_seconds(2.5)
    record_end(folder, 990.0, lambda: clock.now)
    assert spent(folder) == {STARTING: 13.5, USEFUL: 4.0, DATA: 2.0}
    goodput = add_up(read_attempt_times(folder))
    assert goodput.wall_clock == pytest.approx(clock.now - 990.0)
    assert (goodput.attempts, last_lines(read_attempt_times(folder))[0].step) == (1, 2)


def test_what_a_killed_attempt_did_last_is_not_known(clock: Clock, folder: RunFolder) -> None:
    """Catches steps that a kill has lost and that count as ending, and the end of another attempt."""
    timer = clock.begin(folder, total_steps=5, start=990.0)
    train(timer, clock, 1, 2)
    before = spent(folder)
    clock.pass_seconds(2.5)
    record_end(folder, 990.0, lambda: clock.now)
    timer.end_training()
    record_end(folder, 991.0, lambda: clock.now + 100)
    assert spent(folder) == before | {USEFUL: before[USEFUL] + 2.5}


def test_a_clock_that_is_set_back_between_two_attempts(clock: Clock, folder: RunFolder) -> None:
    """Catches the earlier attempt in place of the last one, and negative times."""
    for steps in (10, 20):
        timer = clock.begin(folder, total_steps=steps)
        train(timer, clock, 1, steps)
        clock.pass_seconds(-500)
    attempts = last_lines(read_attempt_times(folder))
    assert [(attempt.step, attempt.total_steps) for attempt in attempts] == [(10, 10), (20, 20)]
    assert min(spent(folder).values()) > 0


@pytest.mark.parametrize("start", [1e9, 1e9 - 365 * 86_400, 100.0])
def test_a_clock_that_is_set_during_the_first_attempt(start: float) -> None:
    """Catches a year, or all since 1970, that counts as down for as long as the run lives."""
    attempts = [
        AttemptTime(first, last, 1, 1, None, TRAINING, {USEFUL: 900.0, STARTING: 100.0})
        for first, last in ((start, 1e9 + 1000), (1e9 + 1500, 1e9 + 2500))
    ]
    goodput = add_up(attempts)
    assert (goodput.seconds[DOWN], goodput.wall_clock) == (500.0, 2500.0)


def test_steps_after_a_rewind_are_redone(clock: Clock, folder: RunFolder) -> None:
    """Catches a rewind within an attempt, or before a crash, whose steps count as useful again."""
    first = clock.begin(folder)
    train(first, clock, 1, 8)
    with first.during(STARTING):
        clock.pass_seconds(1)
    train(first, clock, 5, 6)
    second = clock.begin(folder, step=4)
    train(second, clock, 5, 9)
    assert spent(folder) == {STARTING: 1.0, USEFUL: 16.0 + 2, REDONE: 4.0 + 8, DATA: 8.0 + 2 + 5}


def test_a_file_that_is_being_copied_or_damaged_is_read(clock: Clock, folder: RunFolder) -> None:
    """Catches a crash, or figures that do not add up, where the last line is cut off anywhere."""
    for attempt in range(2):
        timer = clock.begin(folder)
        train(timer, clock, 1, 3 + attempt)
    whole = folder.goodput.read_bytes()
    for end in range(len(whole)):
        folder.goodput.write_bytes(whole[:end])
        if lines := read_attempt_times(folder):
            last = last_lines(lines)
            assert add_up(lines).wall_clock == pytest.approx(last[-1].time - last[0].start, abs=0.01)
    for damage in (b"[]", b"{}", b'{"start": "x"}', b"\xff", b"[" * 100_000, b"null"):
        folder.goodput.write_bytes(damage + b"\n" + whole)
        assert len(last_lines(read_attempt_times(folder))) == 2
    folder.goodput.unlink()
    assert read_attempt_times(folder) == []


def test_a_line_that_was_cut_off_does_not_damage_the_next(clock: Clock, folder: RunFolder) -> None:
    """Catches the first line after a full disk being lost."""
    timer = clock.timer(start=clock.now)
    timer.open(folder, step=0, total_steps=None)
    with folder.goodput.open("ab") as file:
        file.write(b'\n{"start": 1')
    clock.pass_seconds(5)
    timer.record()
    assert spent(folder) == {STARTING: 5.0}


def test_a_folder_that_cannot_be_written_stops_nothing(clock: Clock, folder: RunFolder) -> None:
    """Catches a run that ends because its time cannot be recorded, or never records it again."""
    timer = clock.timer(start=clock.now)
    folder.logs.rename(folder.path / "moved")
    (folder.path / "logs").touch()  # a file in place of the folder
    timer.open(folder, step=0, total_steps=None)
    timer.begin_training()
    train(timer, clock, 1, 2)
    (folder.path / "logs").unlink()
    (folder.path / "moved").rename(folder.logs)
    train(timer, clock, 3, 3)
    assert spent(folder) == {USEFUL: 6.0, DATA: 3.0}


def test_the_file_stays_small(clock: Clock, folder: RunFolder) -> None:
    """Catches a file that grows for weeks, and a shortened one that has lost an attempt or the recent lines."""
    for start, steps in ((0, 5), (0, 1200)):
        timer = clock.begin(folder, step=start)
        train(timer, clock, 1, steps)
    lines = read_attempt_times(folder)
    assert 50 < len(lines) < 1000
    assert [line.step for line in last_lines(lines)] == [5, 1200]
    assert [line.step for line in lines[-3:]] == [1198, 1199, 1200]
    assert add_up(lines).wall_clock == pytest.approx(clock.now - 1000)


def test_what_happens_in_each_step_adds_no_line(clock: Clock, folder: RunFolder) -> None:
    """Catches several writes to the disk in each step."""
    timer = clock.begin(folder)
    before = len(read_attempt_times(folder))
    train(timer, clock, 1, 9, log_every=10)
    assert len(read_attempt_times(folder)) == before
    train(timer, clock, 10, 10, log_every=10)
    assert len(read_attempt_times(folder)) == before + 1


def test_an_attempt_that_has_nothing_to_train(clock: Clock, folder: RunFolder) -> None:
    """Catches the time since the end of a run counted as down; and newer checkpoints of another folder, copied to this
    one, that are taken for damaged ones forever."""
    first = clock.begin(folder, total_steps=5)
    train(first, clock, 1, 5)
    before = read_attempt_times(folder)
    clock.pass_seconds(40)
    clock.timer(start=clock.now).open(folder, step=5, total_steps=5, finished=True)
    assert read_attempt_times(folder) == before
    newest = folder.checkpoints / "step-00000009"
    newest.mkdir(parents=True)
    (newest / "COMPLETE").touch()
    assert reached_checkpoints(folder, before) == []
    clock.timer(start=clock.now).open(folder, step=9, total_steps=9, finished=True)
    assert reached_checkpoints(folder, read_attempt_times(folder)) == [newest]


def test_a_line_says_what_the_attempt_does(clock: Clock, folder: RunFolder) -> None:
    """Catches a status that shows training while the run evaluates."""
    timer = clock.begin(folder, step=7, total_steps=9)
    with timer.during(EVALUATING):
        (line,) = last_lines(read_attempt_times(folder))
        assert (line.activity, line.step, line.total_steps) == ("evaluating", 7, 9)
    assert json.loads(folder.goodput.read_bytes().splitlines()[-1])["activity"] == "training"


def test_an_attempt_starts_with_its_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the time that a launch takes counted as down, and a wrong clock of another machine that is believed."""
    created = process_start()
    monkeypatch.delenv(START_VARIABLE, raising=False)
    assert attempt_start() == pytest.approx(created, abs=0.1)
    for value, expected in ((created - 9, created - 9), (created + 9, created), ("x", created)):
        monkeypatch.setenv(START_VARIABLE, str(value))
        assert attempt_start() == pytest.approx(expected, abs=0.1)


def test_the_start_of_a_process_is_exact() -> None:
    """Catches a start that is a second too early, as psutil's is where the system started within a second."""
    code = (
        "import time; begun = time.time(); from experiment.run_files.goodput import process_start; "
        "print(begun, process_start())"
    )
    before = time.time()
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    begun, found = map(float, output.split())
    assert before - 0.1 <= found <= begun + 0.1


def test_a_busy_machine_does_not_move_a_start_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an attempt that begins before its launch, because another process ran while two clocks were read."""
    reads = itertools.count()
    process = SimpleNamespace(create_time=lambda: 1300.0)
    since = 40.0  # as CLOCK_BOOTTIME; a second passes with each read
    clocks = SimpleNamespace(
        CLOCK_BOOTTIME=time.CLOCK_BOOTTIME,
        clock_gettime=lambda _: 300.0 + since + next(reads),
        time=lambda: 1300.0 + since + next(reads),
    )
    monkeypatch.setattr(goodput, "time", clocks)
    monkeypatch.setattr(goodput, "psutil", SimpleNamespace(Process=lambda: process, boot_time=lambda: 1000.0))
    assert process_start() == 1301.0


def test_other_threads_see_progress(clock: Clock) -> None:
    """Catches a rank that counts as hung although it trains, evaluates or waits for data, and the reverse."""
    timer = clock.timer(1000.0)
    timer.begin_training()
    trains = timer.doing
    clock.pass_seconds(1)
    timer.record()
    assert timer.doing == trains
    timer.make_progress()
    assert timer.doing != trains
    timer.finish_step(7)
    with timer.during(DATA, recorded=False):
        assert timer.doing[:2] == (7, DATA)
    timer.end_training()
    assert timer.doing[:2] == (7, STARTING)
