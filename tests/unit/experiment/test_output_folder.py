import errno
import fcntl
import os
from pathlib import Path

import pytest

from experiment.errors import UserError
from experiment.output_folder import LockedError, new_folder


def write(folder: Path, copied: Path | None = None) -> None:
    with new_folder(folder) as partial:
        partial.mkdir()
        (partial / "file").write_text("x" if copied is None else copied.read_text())


def test_one_process_at_a_time_writes_a_new_folder(tmp_path: Path) -> None:
    """Catches a second command that deletes the files of the first, and a traceback when the first was faster."""
    folder = tmp_path / "missing" / "new"
    with new_folder(folder) as partial:
        partial.mkdir()
        (partial / "file").write_text("first")
        with pytest.raises(LockedError, match=r"--output .*new: another process is writing it"):
            write(folder)
    for existing in (folder, folder / "file"):
        with pytest.raises(UserError, match="already holds something"):
            write(existing)
    assert (folder / "file").read_text() == "first"
    assert list(folder.parent.iterdir()) == [folder]


def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback, and a lock that outlives a node that has died, on Lustre without `-o flock`."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".new.lock").touch()  # of a process that was killed
    write(tmp_path / "new")
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]


def test_what_a_killed_process_has_left_is_not_in_the_folder(tmp_path: Path) -> None:
    """Catches files of an interrupted command in the result of the next one, and leftovers of one that fails."""
    left = tmp_path / ".new.partial"
    left.mkdir()
    (left / "old").touch()
    write(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "other", tmp_path / "missing")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("folder", ["/", "/proc/new", "/proc/missing/new"])
def test_a_folder_that_cannot_be_created_is_named(folder: str) -> None:
    """Catches a traceback for a path that is none of the user's folders."""
    with pytest.raises(UserError, match=rf"--output:? .*{folder}"), new_folder(Path(folder)):
        pass


@pytest.mark.parametrize("target", ["empty", "missing"])
def test_a_link_is_refused_before_the_work(target: str, tmp_path: Path) -> None:
    """Catches a command that works for hours, and then cannot rename its result to the link."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(UserError, match=r"link is a link to a folder that is empty or missing; name that folder"):
        write(tmp_path / "link")
