from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from experiment import files
from experiment.errors import StoppedError, UserError
from experiment.files import write_text
from experiment.run_files.outcome_file import (
    Outcome,
    RankRecord,
    read_outcome,
    read_rank_record,
    recorded_outcome,
    reserve_outcome,
    write_first_outcome,
    write_outcome,
)
from experiment.run_files.run_folder import RunFolder, open_run_folder
from small_disk import SmallDisk


def test_exit_codes_are_the_ones_that_scripts_rely_on() -> None:
    """Catches changed exit codes: queue scripts resubmit a run on 75 only."""
    assert {outcome.name: outcome.exit_code for outcome in Outcome} == {
        "DONE": 0,
        "STOPPED": 75,
        "REFUSED": 2,
        "FAILED": 1,
    }


def test_the_outcome_is_read_back_and_none_if_missing(tmp_path: Path) -> None:
    """Catches a launcher that cannot read the outcome, or takes a missing one for success."""
    folder = open_run_folder(tmp_path)
    assert read_outcome(folder) is None
    write_outcome(folder, Outcome.STOPPED, "signal 15")
    assert read_outcome(folder)[:2] == (Outcome.STOPPED, "signal 15")


@pytest.mark.parametrize(
    ("error", "outcome", "message"),
    [
        (None, Outcome.DONE, ""),
        (StoppedError("stopped at step 7"), Outcome.STOPPED, "stopped at step 7"),
        (KeyboardInterrupt(), Outcome.STOPPED, "interrupted; run the same command again to resume"),
        (UserError("task.train: no such file"), Outcome.REFUSED, "task.train: no such file"),
        (SystemExit("deepcloze: sweep: 1 of 2 runs failed: a"), Outcome.FAILED, "sweep: 1 of 2 runs failed: a"),
        (ZeroDivisionError("by 0"), Outcome.FAILED, "ZeroDivisionError: by 0"),
    ],
)
def test_a_command_records_how_it_ended(
    tmp_path: Path, error: BaseException | None, outcome: Outcome, message: str
) -> None:
    """Catches a run that is `unknown` or seems to be done, because its command recorded nothing or an earlier end."""
    folder = open_run_folder(tmp_path)
    write_outcome(folder, Outcome.DONE, "earlier")
    with suppress(BaseException), recorded_outcome(folder):
        assert read_outcome(folder) is None
        if error is not None:
            raise error
    assert read_outcome(folder) == (outcome, message, None)


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"outcome": "lost", "message": ""}', '{"outcome": "done"}'])
def test_a_damaged_outcome_is_none(tmp_path: Path, damage: str) -> None:
    """Catches a launcher that crashes on a damaged outcome file."""
    folder = RunFolder(tmp_path)
    write_text(folder.outcome, damage)
    assert read_outcome(folder) is None


@pytest.mark.parametrize("message", ["no space", "\x00é😀\ud800" * 5000])
@pytest.mark.parametrize("write", [write_outcome, write_first_outcome])
def test_a_reserved_outcome_is_written_on_a_full_disk(
    small_disk: SmallDisk, write: Callable[[RunFolder, Outcome, str], None], message: str
) -> None:
    """Catches ranks whose outcome is lost with the space for it, and a long message that does not fit."""
    folder = open_run_folder(small_disk.path / "run")
    reserve_outcome(folder)
    small_disk.fill(new_files=False)
    write(folder, Outcome.STOPPED, message)
    found = read_outcome(folder)
    assert found[0] is Outcome.STOPPED
    assert message.startswith(found[1])
    assert found[1]


def test_the_first_outcome_stays_on_a_full_disk(small_disk: SmallDisk) -> None:
    """Catches a later failure that takes the reserved space and hides the cause."""
    folder = open_run_folder(small_disk.path / "run")
    reserve_outcome(folder)
    write_first_outcome(folder, Outcome.FAILED, "out of paper")
    small_disk.fill(new_files=False)
    write_first_outcome(folder, Outcome.FAILED, "connection closed")
    assert read_outcome(folder)[:2] == (Outcome.FAILED, "out of paper")


def test_the_record_of_a_rank_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches `deepcloze pretrain --detach` that returns a minute after rank 0 trains: NFS remembers that a name does
    not exist, until the folder is listed."""
    folder, seen = open_run_folder(tmp_path), set[str]()
    record = RankRecord(0, "node-1", 7, training=True)
    record.write(folder)
    names_in, read_bytes = files.names_in, Path.read_bytes

    def listed(parent: Path) -> list[str]:
        seen.update(names_in(parent))
        return names_in(parent)

    def cached(path: Path) -> bytes:
        if path.name not in seen:
            raise FileNotFoundError
        return read_bytes(path)

    monkeypatch.setattr(files, "names_in", listed)
    monkeypatch.setattr(Path, "read_bytes", cached)
    assert read_rank_record(folder, 0) == record
    assert read_rank_record(folder, 1) is None
