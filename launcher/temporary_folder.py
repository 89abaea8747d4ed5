"""Temporary folders of launches and preflight. A process that is killed leaves its folder; the next one removes it."""

import fcntl
import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from experiment.run_lock import this_machine

_OWNER = ".owner"
_LEFT_SECONDS = 3600.0  # launches and preflight use a folder for less


@contextmanager
def temporary_folder(parent: Path, prefix: str, mode: int) -> Iterator[Path]:
    """Make a folder with this prefix in `parent`, after removing those of processes that were killed."""
    folder = parent / f"{prefix}{platform.node()}-{secrets.token_hex(8)}"
    folder.mkdir(mode=mode)
    try:
        with (folder / _OWNER).open("w", encoding="utf-8") as owner:
            with suppress(OSError):  # a file system without locks: nobody else gets one either
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            json.dump(this_machine(), owner)
            owner.flush()
            _remove_left_folders(folder, prefix)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_left_folders(own: Path, prefix: str) -> None:
    now = own.stat().st_mtime  # by the clock of the disk
    for folder in own.parent.glob(f"{prefix}*"):
        with suppress(OSError):  # it ends now, or is another user's
            if folder != own and folder.stat().st_uid == os.getuid() and _is_left(folder, now):
                shutil.rmtree(folder, ignore_errors=True)


def _is_left(folder: Path, now: float) -> bool:
    """Whether the process that made the folder has ended. Known at once of this machine, of others after some time."""
    with suppress(FileNotFoundError), (folder / _OWNER).open("r+", encoding="utf-8") as owner:
        if owner.read() == json.dumps(this_machine()):
            try:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True
    return now - folder.stat().st_mtime > _LEFT_SECONDS
