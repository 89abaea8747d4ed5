"""A file system of four megabytes that a test can fill."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_SIZE = 4 << 20
_FILES = 200


@dataclass(frozen=True)
class SmallDisk:
    path: Path

    @property
    def _filler(self) -> Path:
        return self.path / "filler"

    def fill(self, leave: int = 0, new_files: bool = True) -> None:
        """Write until nothing but `leave` bytes is free, rounded down to pages. `new_files`: can be created."""
        with self._filler.open("ab", buffering=0) as file:
            _until_full(lambda: file.write(bytes(4096)))
            file.truncate(file.tell() - leave)
        if not new_files:
            self.path.joinpath("empty").mkdir()
            names = iter(range(_FILES + 1))
            _until_full(lambda: self.path.joinpath("empty", str(next(names))).touch())

    def set_writable(self, writable: bool) -> None:
        """As after a change of permissions, which do not bind root. No file on it may be open for writing."""
        mode = "rw" if writable else "ro"
        subprocess.run(["mount", "-o", f"remount,{mode}", str(self.path)], check=True)

    def free(self) -> None:
        """Remove what `fill` has written."""
        self._filler.unlink()
        shutil.rmtree(self.path / "empty", ignore_errors=True)


def _until_full(write) -> None:  # type: ignore[no-untyped-def]
    while True:
        try:
            write()
        except OSError:
            return


@contextmanager
def mounted_small_disk(path: Path) -> Iterator[SmallDisk | str]:
    """The disk, mounted at the empty folder `path` while the block runs; why not, where that is not permitted."""
    if shutil.which("mount") is None:
        yield "there is no command mount"
        return
    options = f"size={_SIZE},nr_inodes={_FILES}"
    mounting = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, text=True, check=False
    )
    if mounting.returncode != 0:
        yield f"cannot mount a small disk: {mounting.stderr.strip()}"
        return
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
