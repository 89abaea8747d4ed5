"""Attempts on several hosts, with stand-ins for the guards."""

import errno
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from experiment.run_files.heartbeat import Heartbeat
from experiment.run_files.outcome_file import Cause, Outcome, RankRecord, write_outcome
from experiment.run_files.run_folder import RunFolder, open_run_folder
from experiment.run_files.run_lock import LockTimes, lock_run
from experiment.tracking import alerts
from experiment.tracking.alerts import Messenger
from launcher.hosts.guarded_hosts import Rendezvous, Reply
from launcher.ranks.deepspeed_command import DeepSpeedCommand
from launcher.supervision import attempt, rank_processes, restarts, stop_signals, supervisor
from launcher.supervision.attempt import LaunchSettings, Layout
from launcher.supervision.launch_result import LaunchResult, read_result
from launcher.supervision.stop_signals import StopSignals
from launcher.supervision.supervisor import supervise
from waiting import wait_until

ROOT = Path(__file__).parents[4]
SLOTS = {"node-1": (0,), "node-2": (0,)}

# Stands for deepspeed and its ranks on all hosts.
RANKS = """
import sys, time
from pathlib import Path
from experiment.run_files.outcome_file import Cause, Outcome, write_outcome
from experiment.run_files.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
"""
# The record of rank 0, which does not say that it trains, and its heartbeat.
RANK_0 = """
from experiment.run_files.heartbeat import Heartbeat, write_heartbeat
from experiment.run_files.outcome_file import RankRecord
RankRecord(0, 'node-1', 7).write(folder)
write_heartbeat(folder, Heartbeat(0, {}, False, 0.0))
"""
HANG = "(folder.path / 'ready').touch(); time.sleep(3600)"


class StandInGuards:
    """Guards of hosts of which nothing is known but what a test sets."""

    def __init__(
        self, hosts: Sequence[str], _launch: str, _environment: Mapping[str, str], _on_lost: Callable[[], object]
    ) -> None:
        self.hosts = list(hosts)
        self.replies = {host: Reply(host, None, 0) for host in hosts}
        self.lost: dict[str, str] = {}
        self.ended: list[RankRecord] = []
        self.has_ended_on: str | None = None

    def ended_host(self) -> str | None:
        return self.has_ended_on

    def named(self, node: str | None) -> list[str]:
        return [host for host in self.hosts if host == node]

    def has_ended(self, node: str, process: int) -> bool:
        return any((record.host, record.pid) == (node, process) for record in self.ended)

    def rendezvous(self) -> Rendezvous:
        return Rendezvous("launch-1", "10.0.0.1", 4567)

    def cancel(self) -> None:
        pass

    def request_stack(self, _: Heartbeat) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class LosesTheSecondHost(StandInGuards):
    """Loses node-2 when the ranks start."""

    def rendezvous(self) -> Rendezvous:
        if "node-2" in self.hosts:
            self.lost["node-2"] = "no answer"
        return super().rendezvous()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return open_run_folder(tmp_path / "run")


@dataclass(frozen=True)
class Ending:
    """The end of an attempt that runs no process."""

    outcome: Outcome
    cause: Cause | None = None
    lost: str = ""
    failed_on: str = ""
    saves: bool = False
    returns: bool = False  # whether a host that is missing is usable after a checkpoint


LOST = Ending(Outcome.FAILED, Cause.LOST_HOST, "node-2", saves=True)
JOINS = Ending(Outcome.STOPPED, Cause.SIGNAL, saves=True, returns=True)
HUNG = Ending(Outcome.FAILED, Cause.HUNG)
REFUSED = Ending(Outcome.REFUSED, Cause.AGREED)
DONE = Ending(Outcome.DONE)


@pytest.fixture(autouse=True)
def no_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs are free at once."""
    monkeypatch.setattr(supervisor, "_RELEASE_SECONDS", 0.0)


def supervise_endings(
    folder: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    *endings: Ending,
    look_seconds: float = 0.0,
    watched: list[Collection[str]] | None = None,
    halvings: list[int] | None = None,
    silent: Sequence[str] | None = (),
    **settings: Any,
) -> tuple[LaunchResult, list[str]]:
    """Supervise attempts that end like this. Returns the result, and the numbers of the hosts of each attempt.
    `watched` gets the missing hosts that each attempt looks for, `halvings` those of its microbatch. `silent`: those
    that do not answer, see `losing`; None: the test replaces `unusable_hosts` itself."""
    remaining, hosts, on_return = iter(endings), list[str](), list[Callable[[], object]]()

    @contextmanager
    def watch(
        missing: Collection[str], look: Callable[[Collection[str]], object], _: object, callback: Callable[[], object]
    ) -> Iterator[None]:
        if watched is not None:
            watched.append(missing)
            look(missing)
        on_return[:] = [callback]
        yield

    def end(_: object, layout: Layout, *__: object) -> LaunchResult:
        hosts.append("".join(host.removeprefix("node-") for host in layout.slots))
        ending = next(remaining)
        if halvings is not None:
            halvings.append(layout.microbatch_halvings)
        if ending.saves:
            checkpoint = folder.checkpoints / f"step-{len(hosts):08d}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "COMPLETE").touch()
        if ending.returns:
            on_return[0]()
        lost, failed_on = frozenset(ending.lost.split()), frozenset(ending.failed_on.split())
        return LaunchResult(ending.outcome, f"ending {len(hosts)}", ending.cause, lost, failed_on)

    monkeypatch.setattr(supervisor, "watch_for_hosts", watch)
    monkeypatch.setattr(supervisor, "run_attempt", end)
    if silent is not None:
        monkeypatch.setattr(supervisor, "unusable_hosts", losing(*silent))
    monkeypatch.setattr(restarts, "_FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(supervisor, "poll_intervals", lambda: repeat(look_seconds))
    settings = {"max_restarts": 1} | settings
    return supervise(replace(launch(folder, ""), **settings)), hosts


def losing(*hosts: str) -> Callable[..., dict[str, str]]:
    """A stand-in for `unusable_hosts`, or for preflight, with other hosts at each of the first looks."""
    looks = iter(hosts)
    return lambda *_: dict.fromkeys(next(looks, "").split(), "refused")


def launch(folder: RunFolder, body: str, layouts: list[Layout] | None = None) -> LaunchSettings:
    def command(layout: Layout, _: Rendezvous | None) -> DeepSpeedCommand:
        if layouts is not None:
            layouts.append(layout)
        argv = (sys.executable, "-c", RANKS + body, str(folder.path))
        return DeepSpeedCommand(argv, os.environ | {"PYTHONPATH": str(ROOT)}, {folder.logs / "worker.env": "A=1\n"})

    return LaunchSettings(folder, SLOTS, command, local=False)


def launches(folder: RunFolder) -> list[dict[str, object]]:
    return [json.loads(line) for line in folder.launches.read_text().splitlines()]


@pytest.mark.parametrize(
    ("reported", "outcome", "cause"),
    [
        ("DONE, ''", Outcome.DONE, None),
        ("FAILED, 'diverged', Cause.AGREED", Outcome.FAILED, Cause.AGREED),
        ("FAILED, 'CUDA out of memory', Cause.OUT_OF_MEMORY", Outcome.FAILED, Cause.OUT_OF_MEMORY),
        ("FAILED, 'connection reset', Cause.LOST_RANK", Outcome.FAILED, Cause.LOST_HOST),
        ("FAILED, 'KeyError', Cause.ERROR", Outcome.FAILED, Cause.LOST_HOST),
    ],
)
def test_a_lost_host_explains_failures_of_ranks_only(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, reported: str, outcome: Outcome, cause: Cause | None
) -> None:
    """Catches a run that is done, or would diverge again, and is restarted because a host went away at its end."""
    monkeypatch.setattr(attempt, "GuardedHosts", LosesTheSecondHost)
    result = supervise(launch(folder, f"write_outcome(folder, Outcome.{reported})"))
    assert (result.outcome, result.cause) == (outcome, cause)
    assert (result.message == "lost node-2: no answer") == (cause is Cause.LOST_HOST)


def test_mpich_does_not_say_how_its_ranks_end(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches mpirun blamed for an error of the ranks, which is then repeated ten times."""
    monkeypatch.setattr(attempt, "GuardedHosts", StandInGuards)
    result = supervise(replace(launch(folder, ""), launcher="mpich"))
    assert (result.outcome, result.cause) == (Outcome.FAILED, Cause.ERROR)
    assert "exited without reporting an outcome (exit code 1)" in result.message


def test_a_host_is_announced_when_its_stop_file_is_made(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an announcement that nothing follows, because the user has made the file or the disk is full."""
    folder.stop.touch()
    with pytest.raises(FileExistsError):
        supervisor._OwnStopFile(folder.stop).make()
    assert capsys.readouterr().err == ""


def test_a_stop_file_is_withdrawn_although_the_disk_has_not_answered(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a launch that ends because it takes the file with which it asks the ranks to stop for the user's."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    own = supervisor._OwnStopFile(folder.stop)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", fail)
        own.make()
    assert own.withdraw()
    assert not folder.stop.exists()


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        ("", (Outcome.FAILED, "the processes on node-2 ended, and the ones on other hosts did not", Cause.KILLED)),
        (
            "write_outcome(folder, Outcome.STOPPED, 'found STOP', Cause.SIGNAL);",
            (Outcome.STOPPED, "found STOP", Cause.SIGNAL),
        ),
    ],
)
def test_ranks_that_wait_for_a_host_without_processes_are_killed(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, reported: str, expected: tuple[Outcome, str, Cause]
) -> None:
    """Catches a launch that waits for ranks whose peers have ended before they could connect, and one that was stopped
    then and calls it a failure."""

    class EndsOnTheSecondHost(StandInGuards):
        def __enter__(self) -> Self:
            threading.Thread(target=self._watch, daemon=True).start()
            return self

        def _watch(self) -> None:
            wait_until((folder.path / "ready").exists)
            self.has_ended_on = "node-2"

    monkeypatch.setattr(attempt, "GuardedHosts", EndsOnTheSecondHost)
    monkeypatch.setattr(attempt, "_REMOTE_EXIT_POLL_SECONDS", 0.05)
    monkeypatch.setattr(rank_processes, "EXIT_TIMEOUT_SECONDS", 0.1)
    RankRecord(0, "node-1", 7).write(folder)
    folder.rank_record(0).rename(folder.logs / "process")
    body = f"(folder.logs / 'process').rename(folder.logs / 'rank-0.json'); {reported} {HANG}"
    result = supervise(launch(folder, body))
    assert (result.outcome, result.message, result.cause) == expected


@pytest.mark.parametrize(
    ("failure", "message", "cause"),
    [
        (
            "write_outcome(folder, Outcome.FAILED, 'node-2, rank 1: KeyError', Cause.ERROR); "
            "RankRecord(1, 'node-2', 9, exit=1).write(folder)",
            "node-2, rank 1: KeyError",
            Cause.ERROR,
        ),
        (
            "folder.rank_log(1).write_text('Segmentation fault'); RankRecord(1, 'node-2', 9).write(folder)",
            "the ranks exited without reporting an outcome (rank 1 on node-2 (process 9) ended first); "
            "their logs are in {logs}\nthe end of rank-1.log:\nSegmentation fault",
            Cause.KILLED,
        ),
        (
            "write_outcome(folder, Outcome.STOPPED, 'node-2, rank 2: SIGTERM before the first step', Cause.SIGNAL); "
            "RankRecord(1, 'node-2', 9).write(folder)",
            "rank 1 on node-2 (process 9) ended first",
            Cause.KILLED,
        ),
        (
            "write_outcome(folder, Outcome.STOPPED, 'node-2, rank 2: SIGTERM before the first step', Cause.SIGNAL); "
            "RankRecord(2, 'node-2', 9, exit=75).write(folder)",
            "a rank that was starting on node-2 ended first",
            Cause.KILLED,
        ),
    ],
)
def test_ranks_that_wait_for_a_failed_one_on_another_host_are_killed(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, failure: str, message: str, cause: Cause
) -> None:
    """Catches a launch that waits for minutes while DeepSpeed's launcher ends ranks in a collective one by one, or
    forever because `srun` ends none, and a message about ranks that the launcher itself has killed or that have lost
    the one that ended first."""

    class LosesAProcess(StandInGuards):
        def __enter__(self) -> Self:
            self.ended = [RankRecord(1, "node-2", 9)]
            return self

        def ended_host(self) -> str | None:
            return "node-2" if folder.rank_record(2).exists() else None

    monkeypatch.setattr(attempt, "GuardedHosts", LosesAProcess)
    monkeypatch.setattr(attempt, "_REMOTE_EXIT_POLL_SECONDS", 0.05)
    monkeypatch.setattr(rank_processes, "EXIT_TIMEOUT_SECONDS", 0.1)
    body = (
        "from experiment.run_files.outcome_file import RankRecord\n"
        f"RankRecord(0, 'node-1', 7, training=True).write(folder); {failure}; {HANG}"
    )
    result = supervise(replace(launch(folder, body), slots={"node-1": (0,), "node-2": (0, 1)}))
    message = message.format(logs=folder.logs)
    assert result == LaunchResult(Outcome.FAILED, message, cause, failed_on=frozenset({"node-2"}))


@pytest.mark.parametrize(
    ("outcome", "message", "cause"),
    [
        (Outcome.STOPPED, "node-1, rank 0: SIGTERM before the first step", Cause.SIGNAL),
        (Outcome.STOPPED, "node-2, rank 2: a second signal, SIGTERM; run again", Cause.SIGNAL),
        (Outcome.STOPPED, "saved step 7", Cause.SIGNAL),
        (Outcome.FAILED, "node-1, rank 0: connection closed", Cause.LOST_RANK),
    ],
)
def test_ranks_that_end_after_a_reported_one_do_not_explain_it(
    folder: RunFolder, outcome: Outcome, message: str, cause: Cause
) -> None:
    """Catches a stop that counts as a failure, because ranks lose the one that has stopped, or end while they save, and
    a host that is blamed for ranks that NCCL has ended when the network failed."""
    write_outcome(folder, outcome, message, cause)
    ranks = Counter(["node-2"])
    result = read_result(folder, 1, {}, [RankRecord(1, "node-2", 9)], remote=True, ranks=ranks, others_killed=True)
    assert (result.outcome, result.cause) == (outcome, cause)
    assert result.message.startswith(message)


def test_a_disk_that_does_not_answer_hides_no_hung_rank(folder: RunFolder) -> None:
    """Catches an error of the disk in place of the rank that hangs because of it."""

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    hang, exits = SimpleNamespace(message="node-2, rank 1 hangs"), SimpleNamespace(silent=fail, killed=False)
    result = attempt._result(launch(folder, ""), StopSignals(folder), hang, exits, 1, {}, Counter())  # type: ignore[arg-type]
    assert result == LaunchResult(Outcome.FAILED, "node-2, rank 1 hangs", Cause.HUNG)


@pytest.mark.parametrize(
    ("message", "cause", "host"),
    [
        ("node-2, rank 1: this GPU cannot be used", Cause.LOST_HOST, {"node-2"}),
        ("node-2, rank 1: RuntimeError: CUDA error", Cause.ERROR, {"node-2"}),
        ("elsewhere, rank 1: RuntimeError: CUDA error", Cause.ERROR, set()),
        ("node-2, rank 1: RuntimeError: rank 0: KeyError", Cause.ERROR, set()),
        ("node-2, rank 1: TimeoutError: node-1, rank 0: no progress for 600 s", Cause.ERROR, set()),
        ("node-2, rank 1: DistBackendError: connection closed by peer", Cause.LOST_RANK, set()),
        ("node-2, rank 1: OutOfMemoryError", Cause.OUT_OF_MEMORY, set()),
        ("step 7: the loss is NaN", Cause.AGREED, set()),
    ],
)
def test_the_host_of_a_failure_is_known(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, message: str, cause: Cause, host: set[str]
) -> None:
    """Catches a host that is left out although another one has failed, and a broken host that is never left out."""
    monkeypatch.setattr(attempt, "GuardedHosts", StandInGuards)
    body = f"write_outcome(folder, Outcome.FAILED, {message!r}, Cause.{cause.name}); sys.exit(1)"
    result = supervise(launch(folder, body))
    assert (result.cause, result.failed_on) == (cause, host)


ON_2 = Ending(Outcome.FAILED, Cause.KILLED, failed_on="node-2")


@pytest.mark.parametrize("failure", [ON_2, replace(ON_2, cause=Cause.HUNG), Ending(ON_2.outcome, ON_2.cause, "node-2")])
def test_a_host_that_the_run_fails_on_twice_is_left_out(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failure: Ending
) -> None:
    """Catches a run that ends because of one host that answers, passes preflight and does not work, although it was
    never lost, and one that never takes the host back."""
    unknown = Ending(Outcome.FAILED, Cause.LOST_RANK)
    endings = [failure, unknown, failure, JOINS, failure, JOINS, DONE]
    result, hosts = supervise_endings(folder, monkeypatch, *endings, max_restarts=2)
    assert (result.outcome, hosts) == (Outcome.DONE, ["12", "12", "12", "1", "12", "1", "12"])
    err = capsys.readouterr().err
    assert "ending 1\nrestarting\n" in err
    assert "ending 3\nrestarting without node-2 until the next checkpoint if others work\n" in err


def test_a_host_that_the_run_fails_on_once_is_used_again(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches hosts that are left out after failures of others, or after a checkpoint, and a run without any host."""
    on_1, saves = replace(ON_2, failed_on="node-1"), replace(ON_2, saves=True)
    endings = [on_1, ON_2, on_1, saves, ON_2, replace(LOST, lost="node-1", saves=False), *[ON_2] * 4, DONE]
    silent = [*[""] * 5, *["node-1"] * 9]
    result, hosts = supervise_endings(folder, monkeypatch, *endings, max_restarts=20, silent=silent)
    assert (result.outcome, hosts) == (Outcome.DONE, [*["12"] * 6, *["2"] * 5])


def test_hosts_that_are_lost_together_are_not_left_out(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run on one of many hosts, after a switch has failed twice for a moment."""
    one, three = (replace(LOST, lost=lost, saves=False) for lost in ("node-2", "node-2 node-3 node-4"))
    slots = dict.fromkeys(("node-1", "node-2", "node-3", "node-4"), (0,))
    endings = [three, three, one, three, DONE]
    result, hosts = supervise_endings(folder, monkeypatch, *endings, max_restarts=9, slots=slots)
    assert (result.outcome, hosts) == (Outcome.DONE, ["1234"] * 5)


@pytest.mark.parametrize(
    "failure", [REFUSED, HUNG, Ending(Outcome.FAILED, Cause.OUT_OF_MEMORY), Ending(Outcome.FAILED, Cause.AGREED)]
)
def test_a_host_is_taken_back_if_the_run_fails_without_it(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failure: Ending
) -> None:
    """Catches a run that ends because it needs a host that was left out and has never been lost, one that stays on a
    host that does not work either, and one that leaves out hosts and takes them back without end."""
    unknown = Ending(Outcome.FAILED, Cause.LOST_RANK)
    endings = [ON_2, ON_2, failure, unknown, ON_2, ON_2, replace(ON_2, saves=True), ON_2, ON_2, JOINS, DONE]
    result, hosts = supervise_endings(folder, monkeypatch, *endings, max_restarts=6)
    assert (result.outcome, hosts) == (Outcome.DONE, [*["12"] * 2, "1", *["12"] * 6, "1", "12"])
    assert "ending 3\nrestarting, trying node-2 again\n" in capsys.readouterr().err
    shutil.rmtree(folder.checkpoints)
    result, hosts = supervise_endings(folder, monkeypatch, ON_2, ON_2, failure, *[ON_2] * 9, max_restarts=2)
    assert result.message == "ending 5\nnot restarted: --max_restarts=2 within an hour"


@pytest.mark.parametrize(
    ("stop", "beat"),
    [
        ("import os; os.kill(os.getppid(), 15)", ""),
        ("folder.stop.touch()", ""),
        ("folder.stop.touch()", RANK_0.format("'node-1', 7, 1, 40, 'starting'")),
        ("folder.stop.touch()", RANK_0.format("'node-1', 6, 9, 50, 'training'")),  # of an earlier attempt
    ],
)
def test_a_stop_before_training_ends_the_ranks_at_once(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, stop: str, beat: str
) -> None:
    """Catches a stop that waits until ranks have started and found each other, longer than a batch system waits."""
    monkeypatch.setattr(attempt, "GuardedHosts", StandInGuards)
    result = supervise(launch(folder, f"{beat}{stop}; {HANG}"))
    assert (result.outcome, result.message[:30]) == (Outcome.STOPPED, "stopped before the first step;")
    assert [attempt["cause"] for attempt in launches(folder)] == ["signal"]


def test_a_stop_while_hosts_do_not_answer_starts_nothing(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a stop that waits for a host that hangs, and ranks that start after it."""

    class Waits(StandInGuards):
        def __enter__(self) -> Self:
            self.cancelled = threading.Event()
            os.kill(os.getpid(), signal.SIGTERM)
            assert self.cancelled.wait(60)
            return self

        def cancel(self) -> None:
            self.cancelled.set()

    monkeypatch.setattr(attempt, "GuardedHosts", Waits)
    result = supervise(launch(folder, "(folder.path / 'started').touch()"))
    assert result.outcome is Outcome.STOPPED
    assert not (folder.path / "started").exists()


@pytest.mark.parametrize(
    "training",
    [
        "from experiment.run_files.outcome_file import RankRecord\n"
        "RankRecord(0, 'node-1', 7, training=True).write(folder)\n",
        RANK_0.format("'node-1', 7, 9, 50, 'training'"),
    ],
)
def test_ranks_that_train_are_left_to_save(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, training: str) -> None:
    """Catches ranks that are killed without a checkpoint by the stop of ranks that do not train yet, also if the disk
    was full when rank 0 began to train."""
    monkeypatch.setattr(attempt, "GuardedHosts", StandInGuards)
    monkeypatch.setattr(stop_signals, "_POLL_SECONDS", 0.01)
    body = (
        f"{training}folder.stop.touch(); time.sleep(1)  # saving\n"
        "write_outcome(folder, Outcome.STOPPED, 'saved step 7')"
    )
    assert supervise(launch(folder, body)).message == "saved step 7"


@pytest.mark.parametrize("is_named", [True, False])
@pytest.mark.parametrize("passes", [True, False])
def test_a_host_that_was_lost_has_to_pass_preflight(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, passes: bool, is_named: bool
) -> None:
    """Catches ranks on a host that is back without its GPUs or disks, or whose GPU a rank could not use, and checks of
    hosts that were never away."""
    checked: list[Collection[str]] = []
    layouts: list[Layout] = []

    def preflight_problems(hosts: Collection[str], answering: Collection[str], _: object) -> dict[str, str]:
        assert list(answering) == list(SLOTS)
        checked.append(set(hosts))
        return {} if passes else {"node-2": "devices: busy"}

    monkeypatch.setattr(attempt, "GuardedHosts", LosesTheSecondHost if is_named else StandInGuards)
    monkeypatch.setattr(supervisor, "unusable_hosts", lambda *_: {})
    body = f"write_outcome(folder, Outcome.FAILED, '', Cause.{'LOST_RANK' if is_named else 'LOST_HOST'})"
    supervise(replace(launch(folder, body, layouts), max_restarts=1, preflight_problems=preflight_problems))
    without = [["node-1"], list(SLOTS)] if is_named and passes else []  # lost again, left out, and taken back
    assert checked == [{"node-2"} if is_named else set(SLOTS)] * (1 + len(without))
    assert [list(layout.slots) for layout in layouts] == [list(SLOTS), list(SLOTS) if passes else ["node-1"], *without]


@pytest.mark.parametrize(
    "failure", [REFUSED, Ending(Outcome.FAILED, Cause.LOST_RANK), replace(ON_2, failed_on="node-1")]
)
def test_a_host_that_returns_and_does_not_work_is_left_out(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failure: Ending
) -> None:
    """Catches a run that ends, or repeats an attempt that fails, because of a host that passes preflight only, and one
    that ends although no other host is left, or never takes the host back."""
    endings = [LOST, JOINS, failure, JOINS, failure, replace(LOST, lost="node-1", saves=False), DONE]
    silent = ["node-2", "", "", "", "", "node-1"]
    result, hosts = supervise_endings(folder, monkeypatch, *endings, max_restarts=2, silent=silent)
    assert (result.outcome, hosts) == (Outcome.DONE, ["12", "1", "12", "1", "12", "1", "2"])
    assert "ending 3\nrestarting without node-2 until the next checkpoint if others work\n" in capsys.readouterr().err


def test_a_host_that_never_works_is_given_up(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a run that spends half its time with a host that passes preflight and fails the run, for weeks, and one
    that uses this host when the others are lost."""
    saves = Ending(Outcome.FAILED, Cause.KILLED, saves=True)
    endings = [LOST, *(JOINS, HUNG) * 3, saves, replace(LOST, lost="node-1"), DONE]
    looks = ("node-2", *[""] * 7, "node-1", "node-1")
    watched: list[Collection[str]] = []
    result, hosts = supervise_endings(folder, monkeypatch, *endings, watched=watched, max_restarts=4, silent=looks)
    assert (result.outcome, hosts) == (Outcome.DONE, ["12", *["1", "12"] * 3, "1", "1", "1"])
    assert watched[-3:] == [set(), set(), set()]
    assert "restarting without node-2 while other hosts answer\n" in capsys.readouterr().err


def test_hosts_that_have_all_rejoined_are_not_all_given_up(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that ends, or waits for no host, although its hosts answer and restarts are left, and one that
    never tries the host that works alone."""
    monkeypatch.setattr(supervisor, "_OUTAGE_HOURS", 0.0)
    lost_1, lost_2 = replace(LOST, lost="node-1"), replace(LOST, saves=False)
    looks = ("node-1", "", "node-2")
    start = [lost_1, JOINS, lost_2, replace(lost_1, saves=False)]
    endings = [*start, *[HUNG] * 2, JOINS, HUNG, DONE]
    result, hosts = supervise_endings(folder, monkeypatch, *endings, max_restarts=20, silent=looks)
    assert (result.outcome, hosts) == (Outcome.DONE, ["12", "2", "12", "1", "12", "1", "2", "12", "2"])
    shutil.rmtree(folder.checkpoints)
    result, hosts = supervise_endings(folder, monkeypatch, *start, *[HUNG] * 30, max_restarts=20, silent=looks)
    assert result.message == f"ending {len(hosts)}\nnot restarted: --max_restarts=20 within an hour"
    assert sorted(hosts[-4:]) == ["1", "1", "2", "2"]


def test_a_lone_host_that_reboots_is_not_given_up(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that waits for other hosts, although its last one has come back from an outage."""
    monkeypatch.setattr(supervisor, "_OUTAGE_HOURS", 0.0)
    lost_2 = replace(LOST, saves=False)
    endings = [LOST, JOINS, replace(lost_2, lost="node-1"), *[lost_2] * 4, DONE]
    silent = ["node-2", "", *["node-1"] * 9]
    result, hosts = supervise_endings(folder, monkeypatch, *endings, max_restarts=20, silent=silent)
    assert (result.outcome, hosts) == (Outcome.DONE, ["12", "1", "12", *["2"] * 5])


def test_the_microbatch_grows_again_when_a_host_rejoins(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that keeps half the microbatch for weeks, because memory ran out while a host was away, one that
    runs out of memory at each return of a host, and a host that is left out for that."""
    full, halvings = Ending(Outcome.FAILED, Cause.OUT_OF_MEMORY), list[int]()
    endings = [LOST, full, JOINS, full, LOST, JOINS, DONE]
    silent = ["node-2", "node-2", "", "", "node-2"]
    settings = {"halvings": halvings, "silent": silent, "max_restarts": 9, "max_halvings": 3}
    result, hosts = supervise_endings(folder, monkeypatch, *endings, **settings)
    assert (result.outcome, hosts) == (Outcome.DONE, ["12", "1", "1", "12", "12", "1", "12"])
    assert halvings == [0, 0, 1, 0, 1, 1, 1]


def test_a_lost_host_must_reach_those_that_run(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a host that never rejoins because it cannot reach another one that is lost."""
    asked: list[tuple[list[str], list[str]]] = []

    def preflight_problems(hosts: Collection[str], peers: Collection[str], _: object) -> dict[str, str]:
        asked.append((list(hosts), list(peers)))
        return {}

    settings = {"preflight_problems": preflight_problems, "silent": ["node-2"]}
    supervise_endings(folder, monkeypatch, LOST, DONE, watched=[], **settings)
    assert asked[-1] == (["node-2"], ["node-1"])


def test_of_hosts_that_return_together_only_those_that_do_not_work_are_given_up(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that spends half its time with several hosts that do not work, for weeks, and one that gives up a
    host because of another."""
    both = replace(LOST, lost="node-2 node-3")
    endings = [both, *(JOINS, HUNG) * 2, JOINS, JOINS, HUNG, DONE]
    slots = dict.fromkeys(("node-1", "node-2", "node-3"), (0,))
    silent = ["node-2 node-3"]
    result, hosts = supervise_endings(folder, monkeypatch, *endings, max_restarts=2, slots=slots, silent=silent)
    assert (result.outcome, hosts) == (Outcome.DONE, ["123", "1", "123", "1", "12", "1", "13", "123", "13"])


def test_a_host_that_does_not_work_is_given_up_while_others_are_lost(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a run that ends because it is restarted on a broken host only, instead of waiting for the others, and one
    that waits or ends without naming this host."""
    looks = ("node-2", "", "", *["node-1"] * 4)
    endings = [LOST, JOINS, HUNG, replace(LOST, lost="node-1", saves=False), HUNG, HUNG, DONE]
    result, hosts = supervise_endings(folder, monkeypatch, *endings, max_restarts=4, silent=looks)
    assert (result.outcome, hosts) == (Outcome.DONE, ["12", "1", "12", "1", "2", "2", "1"])
    given_up = "node-2: given up after 3 failures (used again if no other host answers for 10 minutes)"
    err = capsys.readouterr().err
    assert "ending 6\nrestarting without node-2 while other hosts answer\n" in err
    assert f"waiting for a host, for 24 hours at most; {given_up}\n" in err
    monkeypatch.setattr(supervisor, "_OUTAGE_HOURS", 0.0)
    shutil.rmtree(folder.checkpoints)
    result, _ = supervise_endings(folder, monkeypatch, *endings, max_restarts=4, silent=looks)
    assert result.message == f"no host can be used: node-1: refused; {given_up}"


def test_a_host_that_was_given_up_is_used_while_no_other_answers(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a run that waits a day for a host that is lost for good, although another one answers and restarts are
    left, and one that does not say so."""
    monkeypatch.setattr(supervisor, "REPEAT_SECONDS", 0.0)
    start = [LOST, JOINS, HUNG, replace(LOST, lost="node-1", saves=False)]
    for ends, last, message in (
        ([DONE], "222", "ending 7"),
        ([HUNG] * 9, "2222", "ending 8\nnot restarted: --max_restarts=5 within an hour"),
    ):
        silent = ["node-2", "", "", *["node-1"] * 99]
        result, hosts = supervise_endings(folder, monkeypatch, *start, HUNG, HUNG, *ends, max_restarts=5, silent=silent)
        assert (result.message, hosts) == (message, ["12", "1", "12", "1", *last])
        assert "deepcloze: no other host has answered for 0 minutes: trying node-2 again\n" in capsys.readouterr().err
        shutil.rmtree(folder.checkpoints)


def test_hosts_that_replace_all_others_are_not_left_out(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches hosts that are blamed for a failure although the run has never worked without them."""
    endings = [replace(LOST, lost="node-2 node-3"), replace(LOST, lost="node-1"), *[HUNG] * 4, DONE]
    slots = dict.fromkeys(("node-1", "node-2", "node-3"), (0,))
    silent = ["node-2 node-3", *["node-1"] * 9]
    result, hosts = supervise_endings(folder, monkeypatch, *endings, max_restarts=6, slots=slots, silent=silent)
    assert (result.outcome, hosts) == (Outcome.DONE, ["123", "1", *["23"] * 5])


def test_a_host_is_not_left_out_for_the_loss_of_another(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a host that is left out because another one was lost."""
    endings = [LOST, JOINS, replace(LOST, lost="node-1", saves=False), replace(JOINS, saves=True), DONE]
    result, hosts = supervise_endings(folder, monkeypatch, *endings, max_restarts=2, silent=["node-2", "", "node-1"])
    assert (result.outcome, hosts) == (Outcome.DONE, ["12", "1", "12", "2", "12"])


def test_a_host_that_has_worked_is_not_left_out(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a host that is blamed for a failure after a checkpoint that was saved with it."""
    killed = Ending(Outcome.FAILED, Cause.KILLED, saves=True)
    result, hosts = supervise_endings(folder, monkeypatch, LOST, JOINS, killed, DONE, max_restarts=2, silent=["node-2"])
    assert (result.outcome, hosts) == (Outcome.DONE, ["12", "1", "12", "12"])


@pytest.mark.parametrize("failure", [Ending(Outcome.FAILED, Cause.ERROR, saves=True), REFUSED])
def test_a_failure_that_a_host_may_have_caused_is_followed_by_preflight(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, failure: Ending
) -> None:
    """Catches a run that ends although it could go on without a host whose data disk or GPU has failed."""
    killed = Ending(Outcome.FAILED, Cause.KILLED, saves=True)
    problems = losing("node-2")
    settings = {"preflight_problems": problems, "max_restarts": 2}
    result, hosts = supervise_endings(folder, monkeypatch, killed, failure, DONE, **settings)
    assert (result.outcome, hosts) == (Outcome.DONE, ["12", "12", "1"])


@pytest.mark.parametrize(
    ("cause", "local", "waits"),
    [(Cause.ERROR, False, [0.0, 5.0]), (Cause.ERROR, True, [0.0]), (Cause.KILLED, False, [0.0])],
)
def test_preflight_waits_for_gpu_memory_of_killed_ranks(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, cause: Cause, local: bool, waits: list[float]
) -> None:
    """Catches hosts that are left out because the driver has not freed the memory of their ranks yet, and a wait when
    these hosts need no preflight."""
    monkeypatch.setattr(supervisor, "_RELEASE_SECONDS", 5.0)
    waited: list[float] = []
    monkeypatch.setattr(StopSignals, "wait", lambda _, seconds: waited.append(seconds))
    supervise_endings(folder, monkeypatch, Ending(Outcome.FAILED, cause), DONE, local=local)
    assert waited == waits


def test_a_disk_that_is_full_when_a_host_returns_ends_the_run(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a restart of ranks that stopped because no checkpoint can be written, not to take a host back."""
    full = Ending(Outcome.STOPPED, Cause.AGREED, returns=True)
    result, hosts = supervise_endings(folder, monkeypatch, LOST, full, silent=["node-2"])
    assert (result.outcome, result.message, hosts) == (Outcome.STOPPED, "ending 2", ["12", "1"])


def test_hosts_are_used_if_they_cannot_be_asked(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a launch that ends because the disk of its temporary files is full at a restart."""
    layouts: list[Layout] = []

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/x")

    monkeypatch.setattr(attempt, "GuardedHosts", StandInGuards)
    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    body = "write_outcome(folder, Outcome.FAILED, '', Cause.LOST_RANK)"
    supervise(replace(launch(folder, body, layouts), max_restarts=1))
    assert [layout.slots for layout in layouts] == [SLOTS, SLOTS]


@pytest.mark.parametrize(
    ("silent", "shown", "reasons"),
    [
        (["node-1", "node-2"], "node-1 (refused), node-2 (refused)", "node-1: refused; node-2: refused"),
        (["node-1"], "node-1 (refused), node-2 (devices: busy)", "node-1: refused; node-2: devices: busy"),
    ],
)
def test_a_launch_without_hosts_fails(
    folder: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    silent: Sequence[str],
    shown: str,
    reasons: str,
) -> None:
    """Catches hosts that are left out without a reason, and a launch that never ends."""
    monkeypatch.setattr(supervisor, "_OUTAGE_HOURS", 0.0)
    monkeypatch.setattr(attempt, "GuardedHosts", LosesTheSecondHost)
    monkeypatch.setattr(supervisor, "unusable_hosts", lambda *_: dict.fromkeys(silent, "refused"))
    body = "write_outcome(folder, Outcome.FAILED, '', Cause.LOST_RANK)"
    failing = replace(launch(folder, body), preflight_problems=lambda hosts, *_: dict.fromkeys(hosts, "devices: busy"))
    result = supervise(replace(failing, max_restarts=1))
    assert f"without {shown}, until they answer" in capsys.readouterr().err
    assert result.message == f"no host can be used: {reasons}"
    assert [attempt["attempt"] for attempt in launches(folder)] == [1]


@pytest.mark.parametrize("is_printed", [True, False])
def test_the_reason_of_a_host_is_printed_once(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_printed: bool
) -> None:
    """Catches a second line about a host that preflight has explained, and the same line at each restart."""

    def preflight_problems(hosts: Collection[str], _: object, printed: dict[str, str]) -> dict[str, str]:
        if is_printed:
            printed["node-2"] = "devices: busy"
        return dict.fromkeys(hosts, "devices: busy")

    killed = Ending(Outcome.FAILED, Cause.KILLED, saves=True)
    settings = {"preflight_problems": preflight_problems, "max_restarts": 2}
    supervise_endings(folder, monkeypatch, LOST, killed, DONE, **settings)
    assert capsys.readouterr().err.count("without node-2") == (not is_printed)


def test_an_outage_of_all_hosts_is_no_failure(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a run of weeks that ends because a switch restarts for some minutes, hosts that come back without their
    disks, and a message at each look."""
    for module in (supervisor, alerts):
        monkeypatch.setattr(module, "REPEAT_SECONDS", 0.0)
    sent: list[tuple[str, bool]] = []
    monkeypatch.setattr(Messenger, "alert", lambda _, alert: sent.append((alert.text, alert.repeated)))
    settings = {"preflight_problems": losing("node-2"), "silent": ["node-1 node-2"] * 20}
    result, hosts = supervise_endings(folder, monkeypatch, LOST, DONE, **settings)
    assert (result.outcome, hosts) == (Outcome.DONE, ["12", "1"])
    assert capsys.readouterr().err.count("waiting for a host, for 24 hours at most") == 1
    reasons = "node-1: refused; node-2: refused"
    waiting = f"failed: no host can be used: {reasons}\nwaiting for a host, for 24 hours at most"
    assert sent == [("failed: ending 1\nrestarting", True), (waiting, False)]


def test_a_stop_ends_the_wait_for_hosts(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a launch that is asked to stop and waits for hosts."""

    def stop(*_: object) -> dict[str, str]:
        os.kill(os.getpid(), signal.SIGTERM)
        return dict.fromkeys(SLOTS, "refused")

    monkeypatch.setattr(supervisor, "unusable_hosts", stop)
    result, hosts = supervise_endings(folder, monkeypatch, LOST, look_seconds=3600.0, silent=None)
    assert (result.outcome, hosts) == (Outcome.STOPPED, ["12"])


def test_only_the_user_reads_what_deepspeed_exports(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches variables of `.deepspeed_env`, which may be secret, in a file that other users can read."""
    monkeypatch.setattr(attempt, "GuardedHosts", StandInGuards)
    supervise(launch(folder, "write_outcome(folder, Outcome.DONE)"))
    assert (folder.logs / "worker.env").stat().st_mode & 0o077 == 0


def test_a_launch_over_hosts_is_not_suspended(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches Ctrl-Z, after which the guards would consider the launcher lost."""
    handlers = []

    class Looks(StandInGuards):
        def __enter__(self) -> Self:
            handlers.append(signal.getsignal(signal.SIGTSTP))
            return self

    monkeypatch.setattr(attempt, "GuardedHosts", Looks)
    before = signal.getsignal(signal.SIGTSTP)
    supervise(launch(folder, "write_outcome(folder, Outcome.DONE)"))
    assert handlers == [signal.SIG_IGN]
    assert signal.getsignal(signal.SIGTSTP) is before


def test_a_launch_that_another_machine_has_replaced_ends(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches two machines that train one run, and a record of launches that both write."""
    monkeypatch.setattr(attempt, "GuardedHosts", StandInGuards)
    monkeypatch.setattr(supervisor, "lock_run", partial(lock_run, times=LockTimes(renew=0.05)))
    owner = json.dumps({"host": "elsewhere", "boot": "1", "pid": 7, "id": "1"})
    result = supervise(launch(folder, f"folder.owner.write_text({owner!r}); {HANG}"))
    assert result.outcome is Outcome.STOPPED
    assert f"killing the ranks: another launch has taken over {folder.path}" in capsys.readouterr().err
    assert launches(folder)[0]["outcome"] is None
    assert folder.owner.read_text() == owner


def test_only_a_rank_of_the_launch_is_asked_for_its_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches SIGQUIT to a process that has got the id of a rank that ended."""
    asked: list[int] = []
    monkeypatch.setattr(rank_processes, "request_stack", asked.append)
    beat = Heartbeat(0, "node-1", os.getpid(), 1, 57, "training", False, 0.0)
    processes = rank_processes.RankProcesses()
    with processes.running(os.getpgrp() + 1):
        processes.request_stack(beat)
    assert not asked
    with processes.running(os.getpgrp()):
        processes.request_stack(beat)
    assert asked == [os.getpid()]
