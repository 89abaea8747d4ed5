import json
import multiprocessing
import os
import platform
import resource
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from experiment.errors import AgreedFailureError, HostError, UserError
from experiment.process.own_process import LAUNCH_VARIABLE, START_VARIABLE
from experiment.run_files.outcome_file import Cause, Outcome, ReportedOutcome, read_outcome, write_outcome
from experiment.run_files.run_folder import RunFolder, open_run_folder
from experiment.run_files.run_lock import lock_run
from pretrain import rank_process
from pretrain.batching.loader import DataWorkerError
from pretrain.engine.process_group import LostRankError
from pretrain.rank_process import RankRecorder, run_rank
from pretrain.training.cpu_group import AgreedError
from pretrain.training.stop_request import StopRequest


class Exited(BaseException):
    """Raised in place of the process's exit."""


@pytest.fixture(autouse=True)
def raised_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(code: int) -> None:
        raise Exited(code)

    monkeypatch.setattr(os, "_exit", end)


def end_of(train: Callable[[], Outcome], folder: Path) -> tuple[int, ReportedOutcome | None]:
    """The exit code of a rank that calls `train`, and what it leaves for the launcher."""
    with pytest.raises(Exited) as exited:
        run_rank(lambda _: train(), RankRecorder(RunFolder(folder), 3))
    return exited.value.args[0], read_outcome(RunFolder(folder))


@pytest.mark.parametrize(("outcome", "code"), [(Outcome.DONE, 0), (Outcome.STOPPED, 75)])
def test_a_rank_that_does_not_fail_leaves_the_outcome_to_rank_0(tmp_path: Path, outcome: Outcome, code: int) -> None:
    """Catches a run that is called failed, or a job that a scheduler does not resume."""
    assert end_of(lambda: outcome, tmp_path) == (code, None)


CLOSED = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [192.0.2.1]:2953"
NO_MEMORY = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.mark.parametrize(
    ("error", "outcome", "cause", "code"),
    [
        (AgreedError("a mistake"), Outcome.REFUSED, Cause.AGREED, 2),
        (UserError("a mistake"), Outcome.REFUSED, Cause.AGREED, 2),
        (HostError("COMPLETE cannot be read: Stale file handle"), Outcome.FAILED, Cause.LOST_HOST, 1),
        (AgreedFailureError("the weights have diverged\nsee health/"), Outcome.FAILED, Cause.AGREED, 1),
        (DataWorkerError("the data worker was killed\nits stack"), Outcome.FAILED, Cause.ERROR, 1),
        (torch.OutOfMemoryError("CUDA out of memory"), Outcome.FAILED, Cause.OUT_OF_MEMORY, 1),
        (RuntimeError(NO_MEMORY), Outcome.FAILED, Cause.OUT_OF_MEMORY, 1),
        (dist.DistBackendError("NCCL error"), Outcome.FAILED, Cause.LOST_RANK, 1),
        (dist.DistStoreError("wait timeout after 300000ms"), Outcome.FAILED, Cause.LOST_RANK, 1),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), Outcome.FAILED, Cause.LOST_RANK, 1),
        (LostRankError("not connected: rank 1"), Outcome.FAILED, Cause.LOST_RANK, 1),
        (RuntimeError(CLOSED), Outcome.FAILED, Cause.LOST_RANK, 1),
        (RuntimeError("Application timeout caused pair closure"), Outcome.FAILED, Cause.LOST_RANK, 1),
        (RuntimeError("shape '[3]' is invalid for input of size 4"), Outcome.FAILED, Cause.ERROR, 1),
        (KeyError("a bug"), Outcome.FAILED, Cause.ERROR, 1),
        (KeyboardInterrupt(), Outcome.FAILED, Cause.ERROR, 1),
    ],
    ids=repr,
)
def test_an_exception_decides_what_the_launcher_does(
    tmp_path: Path, error: BaseException, outcome: Outcome, cause: Cause, code: int
) -> None:
    """Catches a failure that is not restarted, a lack of memory that halves no microbatch, and ranks that start again
    after a mistake of the user, or after a failure that would happen again."""

    def train() -> Outcome:
        raise error

    exit_code, reported = end_of(train, tmp_path)
    assert (exit_code, reported.outcome, reported.cause) == (code, outcome, cause)
    assert reported.message.count("\n") == 0, "the rest has been logged"
    assert str(error).partition("\n")[0] in reported.message


def test_a_lack_of_memory_on_a_cpu_halves_the_microbatch(tmp_path: Path) -> None:
    """Catches a release of torch with another error message: the launch would restart with the same microbatch."""

    def train() -> Outcome:
        torch.empty(1 << 62, dtype=torch.uint8)
        return Outcome.DONE

    code, reported = end_of(train, tmp_path)
    assert (code, reported.cause) == (1, Cause.OUT_OF_MEMORY)


def test_a_rank_raises_its_limit_of_open_files(tmp_path: Path) -> None:
    """Catches a rank that runs out of file descriptors although the system allows more than the default of 1024."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = min(before[0], 512), before[1]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert end_of(lambda: Outcome.DONE, tmp_path) == (0, None)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_the_first_failure_stays(folder: RunFolder) -> None:
    """Catches rank 0's loss of its peer in place of the reason."""
    RankRecorder(folder, 1).fail(Outcome.FAILED, "out of paper", Cause.ERROR)
    RankRecorder(folder, 0).fail(Outcome.FAILED, "connection closed", Cause.LOST_RANK)
    assert read_outcome(folder)[:2] == (Outcome.FAILED, "out of paper")
    assert [path.name for path in folder.logs.iterdir()] == ["outcome.json"]


def test_a_file_system_without_hard_links(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a reason that is lost on file systems such as FUSE mounts of object stores."""

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    RankRecorder(folder, 1).fail(Outcome.FAILED, "out of paper", Cause.ERROR)
    RankRecorder(folder, 0).fail(Outcome.FAILED, "connection closed", Cause.LOST_RANK)
    assert read_outcome(folder)[:2] == (Outcome.FAILED, "out of paper")
    assert [path.name for path in folder.logs.iterdir()] == ["outcome.json"]


def _fail(folder: RunFolder, rank: int) -> None:
    RankRecorder(folder, rank).fail(Outcome.FAILED, f"rank {rank}: " + "x" * 100_000, Cause.ERROR)


def test_of_ranks_that_fail_at_once_one_is_reported_whole(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an outcome that is torn, or lost, if ranks write it at the same time."""
    monkeypatch.undo()  # processes end by os._exit
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_fail, args=(folder, rank)) for rank in range(8)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0] * 8
    outcome = read_outcome(folder)
    assert outcome[1].endswith("x" * 100_000)


def test_only_rank_0_writes_what_all_have_agreed_on(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a message printed once for each rank, and an outcome of an earlier run that stays."""
    RankRecorder(folder, 1).announce_refusal(UserError("no such corpus"))
    assert read_outcome(folder) is None
    RankRecorder(folder, 0).announce_refusal(UserError("no such corpus"))
    assert read_outcome(folder) == (Outcome.REFUSED, "no such corpus", Cause.AGREED)
    assert capsys.readouterr().err == "deepcloze: no such corpus\n"
    RankRecorder(folder, 0).record_agreed(ReportedOutcome(Outcome.DONE, ""))
    assert read_outcome(folder) == (Outcome.DONE, "", None), "a run that is done has no cause"


def test_a_rank_leaves_its_process_and_exit_code(folder: RunFolder) -> None:
    """Catches a killed rank that looks like one that has ended."""
    recorder = RankRecorder(folder, 3)
    recorder.start()
    process = {"rank": 3, "host": platform.node(), "pid": os.getpid(), "training": False, "exit": None}
    assert json.loads(folder.rank_record(3).read_text()) == process
    recorder.begin_training()
    assert json.loads(folder.rank_record(3).read_text()) == process | {"training": True}
    recorder.end(75)
    assert json.loads(folder.rank_record(3).read_text()) == process | {"exit": 75}


def test_a_rank_exits_if_stderr_is_closed(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rank that keeps running after it has recorded its exit code, because stderr is closed."""
    read, write = os.pipe()
    os.close(read)
    with suppress(BrokenPipeError), open(write, "w") as closed:
        monkeypatch.setattr(sys, "stderr", closed)
        with pytest.raises(Exited, match="75"):
            rank_process._stop_before_training(RankRecorder(folder, 0), "signal SIGTERM")


def test_a_run_folder_that_cannot_be_written_is_ignored(tmp_path: Path) -> None:
    """Catches a full disk that hides the reason why the run failed."""
    (tmp_path / "run").write_text("a file")
    recorder = RankRecorder(RunFolder(tmp_path / "run"), 0)
    recorder.start()
    recorder.fail(Outcome.FAILED, "", Cause.ERROR)
    recorder.record_agreed(ReportedOutcome(Outcome.DONE, ""))
    recorder.end(1)


@pytest.mark.parametrize("in_use", [True, False])
def test_a_run_that_deepspeed_starts_has_its_folder_alone(
    tmp_path: Path, in_use: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches two runs that write to one folder, an old STOP file that stops each start, and a resumed run that fails
    or is killed, but counts as done because it was before."""
    for variable in (LAUNCH_VARIABLE, START_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    folder = open_run_folder(tmp_path / "run")
    folder.stop.touch()
    write_outcome(folder, Outcome.DONE)

    def train(_: StopRequest) -> Outcome:
        raise KeyError("a bug")

    with lock_run(folder) if in_use else nullcontext(), pytest.raises(Exited) as exited:
        run_rank(train, RankRecorder(folder, 0))
    assert exited.value.args[0] == (Outcome.REFUSED if in_use else Outcome.FAILED).exit_code
    reported = read_outcome(folder)
    assert reported.outcome is (Outcome.DONE if in_use else Outcome.FAILED)
    assert folder.stop.exists() == in_use
    assert (f"another deepcloze process is using {folder.path}" in capfd.readouterr().err) == in_use
    assert not folder.owner.exists()
