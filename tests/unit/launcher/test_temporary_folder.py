import os
import subprocess
import sys
from pathlib import Path

from launcher.temporary_folder import temporary_folder
from waiting import wait_until

OWNER = """
import sys, time
from pathlib import Path
from launcher.temporary_folder import temporary_folder
with temporary_folder(Path(sys.argv[1]), "mine-", mode=0o700) as folder:
    (folder / "secret").touch()
    time.sleep(3600)
"""


def start_owner(parent: Path) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(parent)])
    wait_until(lambda: list(parent.glob("mine-*/secret")), process)
    return process


def test_the_folder_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    """Catches folders with secrets that stay until somebody finds them, and one of a process that still runs which is
    removed."""
    process = start_owner(tmp_path)
    try:
        with temporary_folder(tmp_path, "mine-", mode=0o700):
            assert list(tmp_path.glob("mine-*/secret"))
    finally:
        process.kill()
        process.wait()
    with temporary_folder(tmp_path, "mine-", mode=0o700) as folder:
        assert list(tmp_path.iterdir()) == [folder]
        assert folder.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []


def test_folders_of_others_stay(tmp_path: Path) -> None:
    """Catches the folder of a process on another machine, or of one that is just being made, which is removed."""
    (tmp_path / "mine-elsewhere").mkdir()
    (tmp_path / "mine-elsewhere" / ".owner").write_text('{"host": "elsewhere", "boot": "1"}')
    (tmp_path / "mine-new").mkdir()
    with temporary_folder(tmp_path, "mine-", mode=0o700):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"mine-elsewhere", "mine-new"}
    for name in ("mine-elsewhere", "mine-new"):
        os.utime(tmp_path / name, (0, 0))
    with temporary_folder(tmp_path, "mine-", mode=0o700):
        pass
    assert list(tmp_path.iterdir()) == []
