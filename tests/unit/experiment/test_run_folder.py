from collections.abc import Callable
from pathlib import Path

import pytest

from experiment.errors import UserError
from experiment.files import write_text
from experiment.run_folder import Outcome, RunFolder, open_run_folder
from small_disk import SmallDisk


def test_exit_codes_are_the_ones_that_scripts_rely_on() -> None:
    """Catches changed exit codes: queue scripts resubmit a run on 75 only."""
    assert {outcome.name: outcome.exit_code for outcome in Outcome} == {
        "DONE": 0,
        "STOPPED": 75,
        "REFUSED": 2,
        "FAILED": 1,
    }


def test_opening_creates_the_folder_and_makes_its_path_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run folder that moves when the working directory changes."""
    monkeypatch.chdir(tmp_path)
    folder = open_run_folder("deep/run")
    monkeypatch.chdir("/")
    assert folder.path == tmp_path / "deep" / "run"
    assert folder.logs.is_dir()
    assert not folder.metrics.exists()
    assert open_run_folder(folder.path) == folder


def test_a_folder_that_cannot_be_created_is_rejected(tmp_path: Path) -> None:
    """Catches a traceback if run.dir names a file."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"run\.dir: cannot create the run folder .*file"):
            open_run_folder(path)


def test_a_folder_without_write_permission_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that fails only at its first checkpoint."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match="not writable"):
        open_run_folder(tmp_path)


def test_the_outcome_is_read_back_and_none_if_missing(tmp_path: Path) -> None:
    """Catches a launcher that cannot read the outcome, or takes a missing one for success."""
    folder = open_run_folder(tmp_path)
    assert folder.read_outcome() is None
    folder.write_outcome(Outcome.STOPPED, "signal 15")
    assert folder.read_outcome() == (Outcome.STOPPED, "signal 15")


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"outcome": "lost", "message": ""}', '{"outcome": "done"}'])
def test_a_damaged_outcome_is_none(tmp_path: Path, damage: str) -> None:
    """Catches a launcher that crashes on a damaged outcome file."""
    folder = RunFolder(tmp_path)
    write_text(folder.outcome, damage)
    assert folder.read_outcome() is None


def test_a_folder_name_with_a_nul_character_is_rejected(tmp_path: Path) -> None:
    """Catches a traceback, or a message that prints the NUL character."""
    with pytest.raises(UserError, match=r"run\.dir: cannot create the run folder '.*a\\x00b': embedded null byte"):
        open_run_folder(tmp_path / "a\0b")


@pytest.mark.parametrize("message", ["no space", "\x00é😀\ud800" * 5000])
@pytest.mark.parametrize("write", [RunFolder.write_outcome, RunFolder.write_first_outcome])
def test_a_reserved_outcome_is_written_on_a_full_disk(
    small_disk: SmallDisk, write: Callable[[RunFolder, Outcome, str], None], message: str
) -> None:
    """Catches ranks whose outcome is lost with the space for it, and a long message that does not fit."""
    folder = open_run_folder(small_disk.path / "run")
    folder.reserve_outcome()
    small_disk.fill(new_files=False)
    write(folder, Outcome.STOPPED, message)
    found = folder.read_outcome()
    assert found is not None
    assert found[0] is Outcome.STOPPED
    assert message.startswith(found[1])
    assert found[1]


def test_the_first_outcome_stays_on_a_full_disk(small_disk: SmallDisk) -> None:
    """Catches a later failure that takes the reserved space and hides the cause."""
    folder = open_run_folder(small_disk.path / "run")
    folder.reserve_outcome()
    folder.write_first_outcome(Outcome.FAILED, "out of paper")
    small_disk.fill(new_files=False)
    folder.write_first_outcome(Outcome.FAILED, "connection closed")
    assert folder.read_outcome() == (Outcome.FAILED, "out of paper")
