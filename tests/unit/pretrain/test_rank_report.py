import json
import multiprocessing
import os
import platform
from pathlib import Path

import pytest

from experiment.errors import UserError
from experiment.outcome_file import Cause, Outcome, ReportedOutcome, read_outcome
from experiment.run_folder import RunFolder
from pretrain.rank_report import RankReport


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_the_first_failure_stays(folder: RunFolder) -> None:
    """Catches rank 0's loss of its peer in place of the reason."""
    RankReport(folder, 1).fail(Outcome.FAILED, "out of paper", Cause.ERROR)
    RankReport(folder, 0).fail(Outcome.FAILED, "connection closed", Cause.LOST_RANK)
    assert read_outcome(folder)[:2] == (Outcome.FAILED, "out of paper")
    assert [path.name for path in folder.logs.iterdir()] == ["outcome.json"]


def test_a_file_system_without_hard_links(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a reason that is lost on file systems such as FUSE mounts of object stores."""

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    RankReport(folder, 1).fail(Outcome.FAILED, "out of paper", Cause.ERROR)
    RankReport(folder, 0).fail(Outcome.FAILED, "connection closed", Cause.LOST_RANK)
    assert read_outcome(folder)[:2] == (Outcome.FAILED, "out of paper")
    assert [path.name for path in folder.logs.iterdir()] == ["outcome.json"]


def _fail(folder: RunFolder, rank: int) -> None:
    RankReport(folder, rank).fail(Outcome.FAILED, f"rank {rank}: " + "x" * 100_000, Cause.ERROR)


def test_of_ranks_that_fail_at_once_one_is_reported_whole(folder: RunFolder) -> None:
    """Catches an outcome that is torn, or lost, if ranks write it at the same time."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_fail, args=(folder, rank)) for rank in range(8)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0] * 8
    outcome = read_outcome(folder)
    assert outcome is not None
    assert outcome[1].endswith("x" * 100_000)


def test_only_rank_0_writes_what_all_have_agreed_on(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a message printed once for each rank, and an outcome of an earlier run that stays."""
    RankReport(folder, 1).announce_refusal(UserError("no such corpus"))
    assert read_outcome(folder) is None
    RankReport(folder, 0).announce_refusal(UserError("no such corpus"))
    assert read_outcome(folder) == (Outcome.REFUSED, "no such corpus", Cause.AGREED)
    assert capsys.readouterr().err == "deepcloze: no such corpus\n"
    RankReport(folder, 0).agree(ReportedOutcome(Outcome.DONE, ""))
    assert read_outcome(folder) == (Outcome.DONE, "", None), "a run that is done has no cause"


def test_a_rank_leaves_its_process_and_exit_code(folder: RunFolder) -> None:
    """Catches a killed rank that looks like one that has ended."""
    report = RankReport(folder, 3)
    report.start()
    process = {"rank": 3, "host": platform.node(), "pid": os.getpid(), "training": False, "exit": None}
    assert json.loads(folder.rank_record(3).read_text()) == process
    report.begin_training()
    assert json.loads(folder.rank_record(3).read_text()) == process | {"training": True}
    report.end(75)
    assert json.loads(folder.rank_record(3).read_text()) == process | {"exit": 75}


def test_a_run_folder_that_cannot_be_written_is_ignored(tmp_path: Path) -> None:
    """Catches a full disk that hides the reason why the run failed."""
    (tmp_path / "run").write_text("a file")
    report = RankReport(RunFolder(tmp_path / "run"), 0)
    report.start()
    report.fail(Outcome.FAILED, "", Cause.ERROR)
    report.agree(ReportedOutcome(Outcome.DONE, ""))
    report.end(1)
