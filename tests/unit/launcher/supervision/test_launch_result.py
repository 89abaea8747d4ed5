import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from experiment.run_files.heartbeat import Heartbeat, write_heartbeat
from experiment.run_files.outcome_file import Cause, Outcome, RankRecord, read_rank_records, write_outcome
from experiment.run_files.run_folder import RunFolder, open_run_folder
from launcher.supervision.launch_result import LaunchResult, all_done, begin_attempt, read_result
from launcher.supervision.restarts import Attempt, End, decide

STOPPED = {75, 256 - 15, 256 - 2, 256 - 10, 256 - 12}
OUT_OF_MEMORY = "was killed by SIGKILL, possibly because the system ran out of memory"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return open_run_folder(tmp_path / "run")


def record(folder: RunFolder, rank: int, exit_code: int | None) -> None:
    RankRecord(rank, f"node-{rank}", 70 + rank, exit=exit_code).write(folder)


def result_of(
    folder: RunFolder, exit_code: int, remote: bool = False, ranks: Counter[str] | None = None
) -> LaunchResult:
    """All ranks have ended by themselves. ranks: by host; those with a record."""
    records = read_rank_records(folder)
    silent = [process for process in records if process.exit is None]
    ranks = ranks or Counter(process.host for process in records)
    return read_result(folder, exit_code, {}, silent, remote, ranks)


def message(folder: RunFolder, exit_code: int, remote: bool = False) -> str:
    result = result_of(folder, exit_code, remote)
    assert result.outcome is Outcome.FAILED
    return result.message


def test_the_killed_rank_is_named(folder: RunFolder) -> None:
    """Catches a user who has to search all hosts for the rank that ran out of memory."""
    record(folder, 0, 1)
    record(folder, 1, None)
    assert f"(rank 1 on node-1 (process 71) {OUT_OF_MEMORY})" in message(folder, 247)
    write_outcome(folder, Outcome.FAILED, "node-0, rank 0: lost its peer")
    assert message(folder, 247) == f"rank 1 on node-1 (process 71) {OUT_OF_MEMORY}; node-0, rank 0: lost its peer"
    record(folder, 0, None)
    assert message(folder, 247).startswith("rank 0 on node-0 (process 70) or rank 1 on node-1 (process 71) was")


def test_the_last_step_of_a_killed_rank_is_named(folder: RunFolder) -> None:
    """Catches a rank that dies silently on how far it came."""
    record(folder, 1, None)
    write_heartbeat(folder, Heartbeat(1, "node-1", 71, 9, 57, "training", False, 0.0))
    assert message(folder, 247).startswith(
        "the ranks exited without reporting an outcome (rank 1 on node-1 (process 71) "
    )
    assert f"(process 71) after step 57 {OUT_OF_MEMORY}" in message(folder, 247)


@pytest.mark.parametrize("started", [True, False])
def test_a_killed_remote_shell_is_named(folder: RunFolder, started: bool) -> None:
    """Catches 'exit code 0' as the reason of a failure, and ranks that are restarted only once after it."""
    if started:
        record(folder, 0, None)
    result = result_of(folder, 0, remote=True)
    assert (result.outcome, result.cause) == (Outcome.FAILED, Cause.KILLED)
    assert "(pdsh, mpirun or srun, which runs the ranks on other hosts, was killed)" in result.message
    write_outcome(folder, Outcome.FAILED, "node-0, rank 0: lost its peer", Cause.LOST_RANK)
    result = result_of(folder, 0, remote=True)
    assert (result.message.startswith("pdsh, mpirun or srun"), result.cause) == (True, Cause.KILLED)
    write_outcome(folder, Outcome.STOPPED, "saved step 7", Cause.SIGNAL)
    assert result_of(folder, 0, remote=True).message == "saved step 7"


@pytest.mark.parametrize(("name", "number"), [("KILL", 9), ("SEGV", 11), ("ABRT", 6), ("BUS", 7)])
def test_mpirun_and_srun_name_signals_in_another_way(folder: RunFolder, name: str, number: int) -> None:
    """Catches a launch that counts as stopped because mpirun stopped the ranks that were not killed."""
    assert f"(a rank was killed by SIG{name}" in message(folder, 128 + number, remote=True)
    assert f"(exit code {128 + number})" in message(folder, 128 + number, remote=False)
    record(folder, 1, None)
    write_outcome(folder, Outcome.STOPPED, "node-0, rank 0: SIGTERM before the first step")
    assert message(folder, 128 + number, remote=True).startswith("rank 1 on node-1 (process 71) was killed")
    assert result_of(folder, 128 + 15, remote=True).message.startswith("node-0, rank 0: SIGTERM")


def test_a_rank_that_says_nothing_is_named(folder: RunFolder) -> None:
    """Catches a killed rank that nobody mentions: its signal is lost if DeepSpeed noticed another rank first."""
    record(folder, 0, 1)
    record(folder, 1, None)
    folder.rank_record(2).write_text("{")
    write_outcome(folder, Outcome.FAILED, "node-0, rank 0: lost its peer", Cause.LOST_RANK)
    assert message(folder, 1) == (
        "node-0, rank 0: lost its peer; ended without reporting an outcome: rank 1 on node-1 (process 71)"
    )
    write_outcome(folder, Outcome.FAILED, "node-0, rank 0: KeyError", Cause.ERROR)
    assert message(folder, 1) == "node-0, rank 0: KeyError", "mpirun has killed the others"


def test_an_exit_code_that_is_no_signal_is_printed(folder: RunFolder) -> None:
    """Catches a ValueError: not all numbers are signals."""
    for exit_code in set(range(1, 256)) - STOPPED:
        message(folder, exit_code)
    assert "(exit code 200)" in message(folder, 200)
    assert "(a rank was killed by SIGSEGV)" in message(folder, 245)


def test_the_exit_code_of_ssh_is_no_signal(folder: RunFolder) -> None:
    """Catches 'killed by SIGHUP' for a host that cannot be reached, and ssh blamed where there is none."""
    lost = "ssh failed or lost the connection to a host"
    assert f"({lost})" in message(folder, 255, remote=True)
    assert "(a rank was killed by SIGHUP)" in message(folder, 255, remote=False)
    write_outcome(folder, Outcome.FAILED, "node-0, rank 0: lost its peer")
    assert message(folder, 255, remote=True) == f"{lost}; node-0, rank 0: lost its peer"


def test_ranks_that_cannot_record_their_outcome(folder: RunFolder) -> None:
    """Catches 'stopped before the first step' after the last step, restarts on a disk that has failed, and exit code 2
    without a message, of which the launcher expects that rank 0 has printed it."""
    record(folder, 0, None)
    result = result_of(folder, 75)
    assert (result.outcome, result.cause) == (Outcome.STOPPED, Cause.AGREED)
    assert f"could not write why to {folder.logs}" in result.message
    assert result_of(folder, 2).outcome is Outcome.FAILED
    assert decide([Attempt(result, 0.0, saved=False)], 5, can_halve=True) == End()


@pytest.mark.parametrize("exit_code", sorted(STOPPED))
def test_a_rank_stopped_before_it_could_report(folder: RunFolder, exit_code: int) -> None:
    """Catches a failure reported for a signal to a rank that imports its modules, before it catches signals."""
    assert result_of(folder, exit_code, remote=False).outcome is Outcome.STOPPED


def test_a_rank_killed_before_the_first_step(folder: RunFolder) -> None:
    """Catches a launch that counts as stopped because DeepSpeed stopped the ranks that were not killed."""
    write_outcome(folder, Outcome.STOPPED, "node-0, rank 0: SIGTERM before the first step")
    record(folder, 0, 75)
    record(folder, 1, None)
    assert message(folder, 247) == f"rank 1 on node-1 (process 71) {OUT_OF_MEMORY}"
    assert result_of(folder, 241, remote=False).outcome is Outcome.STOPPED
    record(folder, 1, 1)
    assert result_of(folder, 250, remote=False).outcome is Outcome.STOPPED, "an abort after the end"


@pytest.mark.parametrize("remote", [True, False])
def test_a_rank_that_fails_during_its_imports(folder: RunFolder, remote: bool) -> None:
    """Catches a launch that counts as stopped because the failed rank has not recorded that it has begun."""
    write_outcome(folder, Outcome.STOPPED, "node-0, rank 0: SIGTERM before the first step", Cause.SIGNAL)
    record(folder, 0, 75)
    ranks = Counter({"node-0": 2})
    killed = LaunchResult(Outcome.FAILED, f"a rank {OUT_OF_MEMORY}", Cause.KILLED)
    assert result_of(folder, 247, remote, ranks) == killed
    if not remote:
        failed = LaunchResult(Outcome.FAILED, "a rank failed during its start (exit code 1)", Cause.ERROR)
        assert result_of(folder, 1, remote, ranks) == failed
        assert result_of(folder, 1, remote).outcome is Outcome.STOPPED, "all have begun"
    for exit_code in STOPPED:
        assert result_of(folder, exit_code, remote, ranks).outcome is Outcome.STOPPED, "the others have not begun"


@pytest.mark.parametrize("cause", [Cause.SIGNAL, Cause.AGREED])
def test_a_rank_killed_after_the_last_save(folder: RunFolder, cause: Cause) -> None:
    """Catches a job that is not queued again, or is restarted, because a rank crashed while it ended after a stop that
    all ranks had agreed on."""
    write_outcome(folder, Outcome.STOPPED, "stopped: found STOP", cause)
    record(folder, 0, 75)
    record(folder, 1, None)
    for exit_code, remote in ((250, False), (247, False), (128 + 6, True)):
        assert result_of(folder, exit_code, remote) == LaunchResult(Outcome.STOPPED, "stopped: found STOP", cause)


def test_reports_of_an_earlier_launch_are_removed(folder: RunFolder) -> None:
    """Catches a launch that is blamed on a process of an earlier one."""
    record(folder, 5, None)
    write_outcome(folder, Outcome.DONE)
    folder.rank_log(5).write_text("kept")
    begin_attempt(folder, {"localhost": (0,)}, 0.0)
    assert {path.name for path in folder.logs.iterdir()} == {"rank-5.log", folder.reserved_outcome.name}


def test_a_run_is_done_when_all_its_ranks_have_ended(folder: RunFolder) -> None:
    """Catches a rank that is killed while it still writes, because another one has reported the outcome."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()

    def rank(number: int, exit_code: int | None, pid: int = ended.pid) -> None:
        RankRecord(number, "localhost", pid, exit=exit_code).write(folder)

    rank(0, 0)
    assert not all_done(folder, 1), "no outcome yet"
    write_outcome(folder, Outcome.DONE)
    assert all_done(folder, 1)
    assert not all_done(folder, 2), "one has not started"
    rank(1, None)
    assert not all_done(folder, 2), "one has not recorded its end"
    rank(1, 0, pid=os.getpid())
    assert not all_done(folder, 2), "one has not ended"
    rank(1, 0)
    assert all_done(folder, 2)
    folder.rank_record(1).write_text("{")
    assert not all_done(folder, 2), "one is being written"
    rank(1, 1)
    assert not all_done(folder, 2), "one has failed"


def test_attempts_have_numbers_of_their_own(folder: RunFolder) -> None:
    """Catches an attempt that is recorded as ended like another one, because a line between them is damaged."""
    for _ in range(3):
        attempt = begin_attempt(folder, {"localhost": (0,)}, 0.0)
    attempt.end(LaunchResult(Outcome.FAILED, "disk full"))
    lines = folder.launches.read_text().splitlines()
    folder.launches.write_text("\n".join([lines[0], lines[1][:9], lines[2]]) + "\n")
    begin_attempt(folder, {"localhost": (0,)}, 0.0).end(LaunchResult(Outcome.DONE, ""))
    attempts = [json.loads(line) for line in folder.launches.read_text().splitlines()]
    assert [(attempt["attempt"], attempt["outcome"]) for attempt in attempts] == [
        (1, None),
        (3, "failed"),
        (4, "done"),
    ]
