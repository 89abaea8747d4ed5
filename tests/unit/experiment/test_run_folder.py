from pathlib import Path

import pytest

from experiment.errors import UserError
from experiment.files import write_text
from experiment.run_folder import Outcome, RunFolder, open_run_folder


def test_exit_codes_are_the_ones_that_scripts_rely_on() -> None:
    """Catches a renumbering: queue scripts submit a run again on 75, and only on 75."""
    assert {outcome.name: outcome.exit_code for outcome in Outcome} == {
        "DONE": 0,
        "STOPPED": 75,
        "REFUSED": 2,
        "FAILED": 1,
    }


def test_opening_makes_the_folder_and_makes_its_path_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that goes astray when something changes the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = open_run_folder("deep/run")
    monkeypatch.chdir("/")
    assert folder.path == tmp_path / "deep" / "run"
    assert folder.logs.is_dir()
    assert not folder.metrics.exists()
    assert open_run_folder(folder.path) == folder


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """Catches a trace where run.dir names a file."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"run\.dir: cannot create the run folder .*file"):
            open_run_folder(path)


def test_a_folder_without_write_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that begins and fails at its first checkpoint."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match="not writable"):
        open_run_folder(tmp_path)


def test_the_outcome_is_read_back_and_silence_is_none(tmp_path: Path) -> None:
    """Catches a launcher that cannot tell what the ranks agreed on, or that takes silence for success."""
    folder = open_run_folder(tmp_path)
    assert folder.read_outcome() is None
    folder.write_outcome(Outcome.STOPPED, "signal 15")
    assert folder.read_outcome() == (Outcome.STOPPED, "signal 15")


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"outcome": "lost", "message": ""}', '{"outcome": "done"}'])
def test_a_damaged_outcome_is_silence(tmp_path: Path, damage: str) -> None:
    """Catches a launcher that dies of the file that should tell it how the run died."""
    folder = RunFolder(tmp_path)
    write_text(folder.outcome, damage)
    assert folder.read_outcome() is None
