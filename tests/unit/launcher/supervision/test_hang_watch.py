from collections.abc import Callable
from pathlib import Path

import pytest

from experiment.run_files.heartbeat import Heartbeat, read_heartbeat, write_heartbeat
from experiment.run_files.outcome_file import Cause, Outcome, RankRecord, read_outcome
from experiment.run_files.run_folder import RunFolder, open_run_folder
from launcher.supervision import hang_watch
from launcher.supervision.hang_watch import HangWatch, RankLife, hung_ranks

LIMIT = 80.0  # of a timeout of 100 s
STACKS = """
Thread 0x00007f (most recent call first):
  File "/lib/threading.py", line 3 in wait

Current thread 0x00007e (most recent call first):
  File "/repository/pretrain/training/trainer.py", line 7 in train
  File "/repository/pretrain/run.py", line 9 in main
  File "/repository/pretrain/run.py", line 11 in <module>
"""


def life(rank: int, stuck: float = 0.0, silent: float = 0.0, waits: bool = False) -> RankLife:
    return RankLife(Heartbeat(rank, f"node-{rank}", 70 + rank, 1, 57, "training", waits, stuck), silent)


@pytest.mark.parametrize(
    ("lives", "expected"),
    [
        ([life(0, 79, 79), life(1, 79, waits=True)], []),
        ([life(0, 81, waits=True), life(1, silent=81)], [1]),
        ([life(0, 81, waits=True), life(1, 82)], [1]),
        ([life(0, 81, waits=True), life(1, 1, silent=78), life(2, 5)], [1]),  # they waited for it before
        ([life(0, 81, waits=True), life(1, 1, silent=78, waits=True)], [1]),
        ([life(0, 81, waits=True), life(1, 3)], [1]),  # it falls behind
        ([life(0, 81, waits=True), life(1, 78), life(2, 5)], [1]),  # they waited for it before
        ([life(0, 81, waits=True), life(1, 82, waits=True)], [0, 1]),  # a stuck collective
        ([life(0, 1, waits=True), life(1, 82, waits=True)], [1]),  # both poll whether a save has ended
        ([life(0, 81), life(1, 82)], [0, 1]),
        (
            [life(0, silent=81), life(1, silent=41), life(2, 1)],
            [0, 1],
        ),  # a host is gone; its ranks wrote at different times
        ([life(0, silent=300)], [0]),  # rank 1 has not started
        ([life(0, 300, waits=True)], []),
    ],
)
def test_the_rank_that_others_wait_for_is_found(lives: list[RankLife], expected: list[int]) -> None:
    """Catches a rank that is blamed although it only waits, and a slow one that is not."""
    assert [found.beat.rank for found in hung_ranks(lives, 2 if len(lives) < 3 else 3, LIMIT)] == expected


class Watched:
    """A watch over two ranks with a clock of the test."""

    def __init__(self, folder: RunFolder, request_stack: Callable[[Heartbeat], None] = lambda _: None) -> None:
        self.folder = folder
        self.now = 0.0
        self.ended = False
        self.watch = HangWatch(folder, 2, 100.0, request_stack, self._end, lambda: self.now)

    def _end(self) -> None:
        self.ended = True

    def after(self, seconds: float, *beats: Heartbeat) -> bool:
        """Look again after these beats."""
        self.now += seconds
        for beat in beats:
            write_heartbeat(self.folder, beat)
        return self.watch.is_settled()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return open_run_folder(tmp_path / "run")


def beat(rank: int, number: int, stuck: float = 0.0, waits: bool = False) -> Heartbeat:
    return Heartbeat(rank, f"node-{rank}", 70 + rank, number, 57, "training", waits, stuck)


def test_a_rank_that_has_stopped_is_named_with_its_stack(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a hang without host, rank, step or place, and a stack of an earlier attempt, or that the user has asked
    for."""
    folder.rank_log(1).write_text(STACKS.replace("train", "earlier"))

    def request_stack(found: Heartbeat) -> None:
        assert found.pid == 71
        with folder.rank_log(1).open("a") as log:
            log.write(STACKS)

    watched = Watched(folder, request_stack)
    assert not watched.after(1, beat(0, 1), beat(1, 1))
    with folder.rank_log(1).open("a") as log:
        log.write(STACKS.replace("train", "requested"))
    assert not any(watched.after(10, beat(0, 2 + count)) for count in range(7))
    assert not watched.ended
    assert watched.after(10, beat(0, 20))
    assert watched.ended
    assert watched.watch.hosts == {"node-1"}
    summary = "node-1, rank 1 (process 71) hangs: no sign of life for 80 s (after step 57, training)"
    first, header, *frames = watched.watch.message.splitlines()
    assert first == summary
    assert header == f"the main thread of rank 1, innermost call first; all threads: {folder.rank_log(1)}"
    assert [line.split(" in ")[-1] for line in frames] == ["train", "main", "<module>"]
    assert summary in capsys.readouterr().err
    assert read_outcome(folder) == (Outcome.FAILED, watched.watch.message, Cause.HUNG)


def test_a_rank_that_stopped_while_others_waited_is_silent(folder: RunFolder) -> None:
    """Catches a rank that is said to be slow although it gives no sign of life, because others waited before."""
    watched = Watched(folder)
    assert not watched.after(1, beat(0, 1, stuck=30, waits=True), beat(1, 1, stuck=60))
    assert not watched.after(20, beat(0, 2, stuck=50, waits=True))
    assert not watched.after(20, beat(0, 3, stuck=70, waits=True))
    assert watched.after(11, beat(0, 4, stuck=81, waits=True))
    assert watched.watch.message.startswith("node-1, rank 1 (process 71) hangs: no sign of life for 51 s")


def test_a_stack_that_a_rank_has_written_itself_is_used(folder: RunFolder) -> None:
    """Catches a second stack, and a signal to a rank that waits for a disk."""
    watched = Watched(folder, lambda _: pytest.fail("asked"))
    assert not watched.after(1, beat(0, 1), beat(1, 1))
    folder.rank_log(1).write_text(STACKS)
    assert watched.after(1, beat(0, 2, stuck=81, waits=True), beat(1, 2, stuck=82))
    assert "node-1, rank 1 (process 71) hangs: no progress for 82 s" in watched.watch.message


def test_a_stack_is_read_when_it_is_whole(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks that are ended while they write, and the stack of another thread, which comes first."""
    lines = STACKS.splitlines(keepends=True)

    def write_line(_: object = None) -> None:
        if lines:
            with folder.rank_log(1).open("a") as log:
                log.write(lines.pop(0))

    monkeypatch.setattr(hang_watch.time, "sleep", write_line)
    watched = Watched(folder, write_line)
    watched.after(1, beat(0, 1), beat(1, 1))
    assert watched.after(1, beat(0, 2, stuck=81, waits=True), beat(1, 2, stuck=5))
    assert "in train" in watched.watch.message
    assert watched.watch.message.endswith("in <module>")


def test_a_rank_without_stack_is_named(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a launch that waits for the stack of a rank whose host is gone."""
    monkeypatch.setattr(hang_watch, "_STACK_SECONDS", 0.0)
    watched = Watched(folder)
    watched.after(1, beat(0, 1), beat(1, 1))
    assert watched.after(1, beat(0, 2, stuck=81, waits=True), beat(1, 2, stuck=5))
    assert "rank 1 (process 71) hangs: others wait for it" in watched.watch.message
    assert watched.watch.message.endswith("the stack of rank 1 is not known: it does not react to signals")


def test_a_rank_that_has_ended_does_not_hang(folder: RunFolder) -> None:
    """Catches a run that fails at its end because one rank has exited before another."""
    RankRecord(1, "node-1", 71, exit=0).write(folder)
    watched = Watched(folder)
    watched.after(1, beat(0, 1), beat(1, 1))
    assert not any(watched.after(10, beat(0, 2 + count)) for count in range(20))


def test_a_rank_that_waits_for_one_that_has_ended_hangs(folder: RunFolder) -> None:
    """Catches a launch that waits forever for ranks in a collective, because one has ended and is not one of them."""
    watched = Watched(folder)
    watched.after(1, beat(0, 1), beat(1, 1))
    RankRecord(1, "node-1", 71, exit=75).write(folder)
    assert any(watched.after(1, beat(0, 2 + count, stuck=81 + count, waits=True)) for count in range(3))
    assert watched.watch.message.startswith("node-0, rank 0 (process 70) hangs: no progress for")


def test_a_machine_that_was_suspended_has_not_hung(folder: RunFolder) -> None:
    """Catches a run that ends when a laptop wakes up, or a job that was suspended continues."""
    watched = Watched(folder)
    watched.after(1, beat(0, 1), beat(1, 1))
    assert not watched.after(3600)
    assert not watched.after(1, beat(0, 2), beat(1, 2))


def test_a_disk_that_does_not_answer_is_no_rank(folder: RunFolder) -> None:
    """Catches ranks that are blamed because the disk that their heartbeats need cannot be written."""
    watched = Watched(folder)
    watched.after(1, beat(0, 1), beat(1, 1))
    folder.logs.rename(folder.path / "away")
    assert not any(watched.after(10) for _ in range(20))
    (folder.path / "away").rename(folder.logs)
    assert not watched.after(10), "the ranks have had no time for another heartbeat"


def test_a_heartbeat_is_overwritten(folder: RunFolder) -> None:
    """Catches the rest of a longer heartbeat, and one that is being written."""
    write_heartbeat(folder, beat(3, 10**6, stuck=1234.5))
    write_heartbeat(folder, beat(3, 1))
    assert read_heartbeat(folder, 3) == beat(3, 1)
    folder.heartbeat(3).write_text("")
    assert read_heartbeat(folder, 3) is None
    assert read_heartbeat(folder, 4) is None
