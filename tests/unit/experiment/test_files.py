import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import xxhash

from experiment.files import (
    atomic_write,
    checksum,
    created_parents,
    fsync_tree,
    read_items,
    read_json,
    removed_on_error,
    sha256,
    temporary_folder,
    write_json,
    write_text,
)
from small_disk import SmallDisk
from waiting import wait_until


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    """Catches files written in place, and temporary files left behind."""
    path = tmp_path / "a" / "state.json"
    write_json(path, {"é": 1})
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half of it \ud800")
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["state.json"]


def test_folders_that_stay_empty_are_removed(tmp_path: Path) -> None:
    """Catches a folder that a command leaves which has written nothing, and one that is removed with its files."""
    (tmp_path / "old").mkdir()
    with created_parents(tmp_path / "old" / "a" / "b" / "file"):
        (tmp_path / "old" / "a" / "kept").touch()
    assert [path.name for path in (tmp_path / "old" / "a").iterdir()] == ["kept"]
    with created_parents(tmp_path / "new" / "a" / "file"):
        assert (tmp_path / "new" / "a").is_dir()
    assert not (tmp_path / "new").exists()


def test_a_reader_never_sees_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a file that is renamed before its content is on disk."""
    path = tmp_path / "f"
    write_text(path, "old")
    seen: list[str] = []
    monkeypatch.setattr("os.fsync", lambda descriptor: seen.append(path.read_text()))
    write_text(path, "new")
    assert seen == ["old", "new"], "the file before it is renamed, then its folder"
    assert path.read_text() == "new"


def test_a_folder_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches network file systems on which no checkpoint can be saved, and a file whose error is ignored or does not
    name it."""
    (tmp_path / "a").touch()
    failing = [stat.S_ISDIR]

    def sync(descriptor: int) -> None:
        if any(is_kind(os.fstat(descriptor).st_mode) for is_kind in failing):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("os.fsync", sync)
    fsync_tree(tmp_path)
    failing.append(stat.S_ISREG)
    with pytest.raises(OSError, match=f"Invalid argument: '{tmp_path}/a'"):
        fsync_tree(tmp_path)


def test_an_error_while_writing_keeps_the_old_content(tmp_path: Path) -> None:
    """Catches a figure or an index that is half written, and a temporary file left behind."""
    path = tmp_path / "f.png"
    path.write_bytes(b"old")

    def fail() -> None:
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_digests_are_the_published_ones(tmp_path: Path) -> None:
    """Catches a block that is skipped or read twice: checkpoints and corpora on disk record these digests."""
    path = tmp_path / "f"
    content = bytes(range(256)) * (1 << 17)  # two blocks
    path.write_bytes(content)
    assert sha256(path) == hashlib.sha256(content).hexdigest()
    assert checksum(path) == xxhash.xxh3_128_hexdigest(content)
    for read in (sha256, checksum, read_json):
        with pytest.raises(OSError, match="Input/output error: '/proc/self/mem'"):  # of read, which knows no name
            read(Path("/proc/self/mem"))


def test_items_have_the_numbers_of_their_lines(tmp_path: Path) -> None:
    """Catches a list whose lines end in CR alone, as some programs write it, that becomes one item."""
    (tmp_path / "list").write_bytes("\ufeffa\r\rb\u2028c\r\n d \n".encode())
    assert read_items(tmp_path / "list", "key") == [(1, "a"), (3, "b\u2028c"), (4, "d")]


def test_a_full_disk_names_the_file_and_leaves_the_old_one(small_disk: SmallDisk) -> None:
    """Catches an error without a name, which is all that write(2) gives, and a temporary file that stays."""
    path = small_disk.path / "f"
    write_text(path, "old")
    small_disk.fill()
    with pytest.raises(OSError, match="No space left") as caught:
        write_text(path, "new")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert {entry.name for entry in small_disk.path.iterdir()} == {"f", "filler"}


def test_a_folder_is_removed_on_error(tmp_path: Path) -> None:
    """Catches a half-written folder that keeps the disk full, and a complete one that is removed."""
    for name in ("complete", "half"):
        (tmp_path / name).mkdir()
    with removed_on_error(tmp_path / "complete"):
        pass
    with pytest.raises(KeyboardInterrupt), removed_on_error(tmp_path / "half"):
        raise KeyboardInterrupt
    assert [entry.name for entry in tmp_path.iterdir()] == ["complete"]


OWNER = """
import sys, time
from pathlib import Path
from experiment.files import temporary_folder
with temporary_folder(Path(sys.argv[1]), "mine-") as folder:
    (folder / "secret").touch()
    time.sleep(3600)
"""


def test_the_folder_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    """Catches folders with secrets that stay or that others can read, and the folder of a process that still runs,
    however old, which is removed."""
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)])
    try:
        wait_until(lambda: list(tmp_path.glob("mine-*/secret")), process)
        (running,) = tmp_path.iterdir()
        os.utime(running, (0, 0))
        with temporary_folder(tmp_path, "mine-"):
            assert list(tmp_path.glob("mine-*/secret"))
    finally:
        process.kill()
        process.wait()
    os.utime(running, (now := time.time() - 60, now))
    with temporary_folder(tmp_path, "mine-") as folder:
        assert list(tmp_path.iterdir()) == [folder]
        assert folder.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []


def test_folders_of_other_machines_are_removed_after_an_hour(tmp_path: Path) -> None:
    """Catches the folder of a process on another machine, whose lock is not seen here, which is removed."""
    for name in ("mine-elsewhere-1", "other-1"):
        (tmp_path / name).mkdir()
    with temporary_folder(tmp_path, "mine-"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"mine-elsewhere-1", "other-1"}
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    with temporary_folder(tmp_path, "mine-"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["other-1"]
