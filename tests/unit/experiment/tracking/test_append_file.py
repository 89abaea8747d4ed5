import errno
from pathlib import Path

import pytest

from experiment.tracking.append_file import AppendFile


@pytest.mark.parametrize("failures", [1, 2, 5])
@pytest.mark.parametrize("truncating", ["works", "fails too"])
@pytest.mark.parametrize("written", [0, 4, None])
def test_a_full_disk_leaves_no_half_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int, truncating: str, written: int | None
) -> None:
    """Catches a partial record to which the next one is appended once there is space again, a position that is wrong
    after several failed writes, and a record that `append` has accepted and a later failure removes.

    written: bytes of the record that reach the file before the write fails; None: all, then the write raises.
    """
    path = tmp_path / "m.jsonl"
    appended = AppendFile(path)
    file = appended._file

    class FullDisk:
        def write(self, record: bytes) -> int:
            if written is None:
                file.write(record)
                raise OSError(errno.EIO, "No space left, or another error")
            return file.write(record[:written])

        def truncate(self, size: int) -> int:
            if truncating == "works":
                return file.truncate(size)
            raise OSError(errno.EIO, "No space left, or another error")

    expected = []
    for _ in range(3):
        monkeypatch.setattr(appended, "_file", FullDisk())
        for failure in range(failures):
            with pytest.raises(OSError, match="No space left"):
                appended.append(b"failed" + failure * b"x" + b"\n")
        monkeypatch.setattr(appended, "_file", file)
        appended.append(b"written\n")
        expected.append(b"written")
        assert path.read_bytes().splitlines() == expected


def test_a_failed_close_leaves_no_half_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the remains of the last record, if it could not be written, in a closed file."""
    path = tmp_path / "m.jsonl"
    appended = AppendFile(path)
    appended.append(b"first\n")
    file = appended._file

    class Broken:
        def write(self, record: bytes) -> int:
            return file.write(record[:4])

        def truncate(self, size: int) -> int:
            raise OSError(errno.EIO, "No space left")

    monkeypatch.setattr(appended, "_file", Broken())
    with pytest.raises(OSError, match="No space left"):
        appended.append(b"second\n")
    monkeypatch.setattr(appended, "_file", file)
    appended.close()
    assert path.read_bytes() == b"first\n"
