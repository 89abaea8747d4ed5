import datetime
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import pytest

from experiment.errors import HostError
from pretrain.training import cpu_group
from pretrain.training.cpu_group import CpuGroup
from pretrain.world import World


class Meeting(NamedTuple):
    """Of two ranks: what is true of them then."""

    here_done: bool
    here_progressed: bool
    other_done: bool
    other_stuck: bool = False


def progress_at(meetings: Sequence[Meeting], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The meetings that count as progress of this rank. Fails unless the wait ends with the last one."""
    part: Future[Any] = Future()
    held: list[int] = []
    progress: list[int] = []

    def wait(_: object, timeout: float) -> None:
        assert timeout <= 1.0
        if meetings[len(held)].here_done and not part.done():
            part.set_exception(OSError("the disk is full"))

    def all_reduce_sum(group: CpuGroup, numbers: Sequence[int], is_progress: bool) -> list[int]:
        meeting = meetings[len(held)]
        held.append(len(held))
        if is_progress:
            group._on_progress()
        return [numbers[0] + meeting.other_done, numbers[1] + meeting.other_stuck]

    monkeypatch.setattr(cpu_group.dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(cpu_group, "wait", wait)
    monkeypatch.setattr(CpuGroup, "all_reduce_sum", all_reduce_sum)
    monkeypatch.setattr(CpuGroup, "first_message", lambda _, here, always_name_rank: here or "rank 1: no progress")
    group = CpuGroup(World(size=2), datetime.timedelta(seconds=2), lambda: progress.append(held[-1]))
    try:
        group.wait_for_all(part, lambda: meetings[len(held)].here_progressed)
    finally:
        assert len(held) == len(meetings)
    return progress


def test_a_part_that_is_stuck_makes_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rank whose writer is stuck and that never counts as hung, since the ranks still meet; and a rank that
    counts as hung while its disk is slow."""
    slow, stuck = Meeting(False, True, False), Meeting(False, False, True)
    assert progress_at([slow, stuck, stuck, slow, Meeting(True, False, True)], monkeypatch) == [0, 3, 4]


def test_a_rank_that_waits_for_others_makes_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rank that has failed or is done, and counts as hung instead of the one that it waits for."""
    done = Meeting(True, False, False)
    assert progress_at([done, done, done._replace(other_done=True)], monkeypatch) == [0, 1, 2]


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (Meeting(False, False, False), "no progress for 2 s"),
        (Meeting(False, True, False, other_stuck=True), "rank 1: no progress"),
    ],
)
def test_a_part_that_is_stuck_ends_the_wait(last: Meeting, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks that wait forever for a dead disk without deepcloze's launcher, and a timeout of a rank that made
    progress in between."""
    slow, stuck = Meeting(False, True, True), Meeting(False, False, True)
    with pytest.raises(TimeoutError, match=message):
        progress_at([stuck, stuck, slow, stuck, stuck, last], monkeypatch)


@pytest.mark.parametrize(
    "method", [CpuGroup.call, lambda group, function: group.from_all_ranks_slowly(lambda _: function())]
)
def test_a_problem_of_one_host_is_no_mistake(
    method: Callable[[CpuGroup, Callable[[], None]], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a disk that is away for a moment, and ends the run as a mistake in its config would."""

    def fail() -> None:
        raise HostError("stale")

    monkeypatch.setattr(cpu_group.dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(CpuGroup, "all_gather_objects", lambda _, value: [value])
    monkeypatch.setattr(CpuGroup, "wait_for_all", lambda _group, part, _made_progress: part.exception())
    with pytest.raises(HostError):
        method(CpuGroup(World(), datetime.timedelta(seconds=2)), fail)
