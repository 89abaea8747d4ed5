"""A run ends like one that is not disturbed although the power is cut: what was not synced to the disk is lost."""

import fcntl
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiment.run_files.checkpoints import checkpoint_step, complete_checkpoints, verify
from launches import MARK, SLOW_STEPS, Start, config_file, kill, marked, patched, wait_for_exit
from rank_pool import RankPool
from runs import assert_same_run, pretrain_case, run_config
from waiting import wait_until

_SIZE = 256 << 20
_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
_NO_LOG_FLUSH = 2  # with it, nothing is written any more
_STEPS, _EVERY = 60, 3

# Names soon reach the disk, contents late: what is not synced before it is renamed is lost.
_OPTIONS = "loop,noauto_da_alloc,commit=1"


class Disk:
    """A file system whose power can be cut."""

    def __init__(self, image: Path, path: Path) -> None:
        self._image, self.path = image, path

    def mount(self) -> str:
        """Return why it cannot be mounted."""
        command = ["mount", "-t", "ext4", "-o", _OPTIONS, str(self._image), str(self.path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return "" if done.returncode == 0 else done.stderr.strip() or "mount failed"

    def cut_power(self) -> None:
        folder = os.open(self.path, os.O_RDONLY)
        fcntl.ioctl(folder, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        os.close(folder)

    def restart(self) -> None:
        """Mount it again when no process uses it any more."""
        wait_until(lambda: subprocess.run(["umount", str(self.path)], capture_output=True, check=False).returncode == 0)
        assert self.mount() == ""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    mkfs = shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if mkfs is None or shutil.which("mount") is None:
        pytest.skip("there is no command mkfs.ext4 or mount")
    found = Disk(tmp_path / "disk.img", tmp_path / "disk")
    found.path.mkdir()
    with (tmp_path / "disk.img").open("wb") as image:
        image.truncate(_SIZE)
    subprocess.run([mkfs, "-q", "-F", str(tmp_path / "disk.img")], check=True)
    if problem := found.mount():
        pytest.skip(f"cannot mount a disk: {problem}")
    yield found
    subprocess.run(["umount", "--lazy", str(found.path)], capture_output=True, check=False)


@pytest.mark.soak
def test_a_power_cut_loses_no_checkpoint(
    disk: Disk, start: Start, wordpiece_corpus: Path, tmp_path: Path, pools: dict[int, RankPool]
) -> None:
    """Catches a file that is renamed, or a checkpoint that is deleted, before what replaces it is on disk, and a run
    that does not resume from logs with damaged lines."""
    folder = disk.path / "run"

    def saved() -> list[Path]:
        return complete_checkpoints(folder / "checkpoints")

    changes = {"schedule__steps": _STEPS, "checkpoint__every_steps": _EVERY, "checkpoint__keep_last": 1}
    config = config_file(tmp_path, wordpiece_corpus, **changes, run__dir=str(folder))
    command = (sys.executable, "-m", "launcher", "pretrain", "--config", str(config), "--num_gpus=2", "--oversubscribe")
    for step in (_EVERY, 5 * _EVERY, 10 * _EVERY):
        launch = start(*command, **{MARK: str(folder)}, **patched(tmp_path, SLOW_STEPS))
        wait_until(lambda step=step: saved() and checkpoint_step(saved()[-1]) >= step, launch)
        disk.cut_power()
        kill([process.pid for process in marked(folder)])
        wait_for_exit(launch)
        wait_until(lambda: not marked(folder))
        disk.restart()
        assert [verify(checkpoint) for checkpoint in saved()] == [None] * len(saved())
        assert saved() or step == _EVERY, "the last one was deleted before its successor was on disk"
        assert all(checkpoint_step(checkpoint) >= step - _EVERY for checkpoint in saved())
    code, output = wait_for_exit(start(*command, **{MARK: str(folder)}))
    assert code == 0, output
    pools[2].run(pretrain_case, run_config(tmp_path / "undisturbed", wordpiece_corpus, **changes))
    assert_same_run(folder, tmp_path / "undisturbed", _STEPS)
