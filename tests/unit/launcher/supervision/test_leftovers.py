import os
import time
from pathlib import Path

import pytest

from experiment.run_files.run_folder import RunFolder, open_run_folder
from launcher.supervision.leftovers import remove_earlier_output, remove_launch_leftovers


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return open_run_folder(tmp_path / "run")


@pytest.mark.parametrize("skew", [-30, 30])
def test_a_stop_file_on_a_disk_with_another_clock(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, skew: int
) -> None:
    """Catches a run that starts although the user has stopped it, or stops at once because of an old STOP file, if the
    clock of the disk is behind or ahead."""
    clock_of_disk = time.time
    monkeypatch.setattr(time, "time", lambda: clock_of_disk() + skew)
    for age, is_kept in ((5, True), (15, False)):
        folder.stop.touch()
        os.utime(folder.stop, (0, clock_of_disk() - age))
        remove_launch_leftovers(folder, checked_at=time.time() - 10)
        assert folder.stop.exists() == is_kept


def test_a_stop_file_on_a_disk_that_does_not_date_folders(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a STOP file of this launch that is removed because a disk ignores the date given to a folder."""
    os.utime(folder.logs, (0, 0))
    folder.stop.touch()
    utime = os.utime
    monkeypatch.setattr(os, "utime", lambda path, *times: None if Path(path).is_dir() else utime(path, *times))
    before = sorted(folder.logs.iterdir())
    remove_launch_leftovers(folder, checked_at=time.time() - 10)
    assert folder.stop.exists()
    assert sorted(folder.logs.iterdir()) == before


def test_a_launch_in_the_foreground_removes_the_output_of_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches `deepcloze logs` that shows what an earlier launch printed, and a launch that removes its own output."""
    folder = open_run_folder(tmp_path / "run")
    folder.launch_output.write_text("earlier")
    mine = folder.launch_output.stat()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", lambda descriptor: mine)
        remove_earlier_output(folder)
    assert folder.launch_output.exists()
    remove_earlier_output(folder)
    assert not folder.launch_output.exists()
    remove_earlier_output(folder)
    assert list(folder.logs.iterdir()) == []
