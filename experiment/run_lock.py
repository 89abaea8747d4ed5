"""One process at a time writes to a run folder: the launch of a pretraining, or a fine-tuning.

On one machine the system keeps the lock and releases it when the process ends, however it ends. Not all network file
systems do that between machines. There the owner renews a file, and one that has not been renewed for a while counts as
dead.
"""

import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from experiment.errors import UserError
from experiment.files import write_json
from experiment.run_folder import RunFolder
from experiment.strict_json import parse_json

_RENEW_SECONDS = 2.0
_LEASE_SECONDS = 120.0  # for which an NFS server keeps the lock of a dead client; Linux: 90
_DEAD_SECONDS = 20.0
"""A machine that has not renewed its file for so long is dead, or has lost the disk."""


@contextmanager
def lock_run(folder: RunFolder, on_lost: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Raises UserError if another process, of this machine or another one, uses the run folder, which must exist.

    Takes as long as `_DEAD_SECONDS` after a process on another machine that did not end properly. `on_lost` is called
    in a thread if another machine takes the lock because this one has lost the disk for so long.
    """
    lock = filelock.FileLock(folder.lock)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if not _is_of_other_machine(_owner(folder.owner)):
            raise _used(folder) from None
        _check_other_machine(folder)  # it is dead, but NFS keeps its lock for some time
        try:
            lock.acquire(timeout=_LEASE_SECONDS)
        except filelock.Timeout:
            raise _used(folder) from None
    try:
        _check_other_machine(folder)
        with _owner_file(folder.owner, on_lost):
            yield
    finally:
        lock.release()


def check_unlocked(folder: RunFolder) -> None:
    """Raises UserError as `lock_run`. The folder may not exist, and nothing is written."""
    _check_other_machine(folder)
    if is_locked(folder) and not _is_of_other_machine(_owner(folder.owner)):
        raise _used(folder)


def is_locked(folder: RunFolder) -> bool:
    """Whether another process of this machine uses the run folder, which may not exist."""
    if not folder.lock.exists():
        return False
    try:
        with filelock.FileLock(folder.lock, timeout=0):
            return False
    except filelock.Timeout:
        return True


def _used(folder: RunFolder) -> UserError:
    return UserError(f"run.dir: another deepcloze process is using {folder.path}")


def _check_other_machine(folder: RunFolder) -> None:
    owner = _owner(folder.owner)
    if owner is None or not _is_of_other_machine(owner):
        return
    renewed, deadline = _renewed(folder.owner), time.monotonic() + _DEAD_SECONDS
    while time.monotonic() < deadline:
        time.sleep(_RENEW_SECONDS / 4)
        if _owner(folder.owner) is None:
            return
        if _renewed(folder.owner) != renewed:
            raise UserError(
                f"run.dir: another deepcloze process, {owner['pid']} on {owner['host']}, is using {folder.path}"
            )


def _is_of_other_machine(owner: Mapping[str, object] | None) -> bool:
    return owner is not None and owner["host"] != platform.node()


@contextmanager
def _owner_file(path: Path, on_lost: Callable[[], object]) -> Iterator[None]:
    """Write the file, renew it in a thread, and remove it at the end."""
    mine = {"host": platform.node(), "pid": os.getpid(), "id": os.urandom(8).hex()}
    write_json(path, mine)
    released = threading.Event()

    def renew() -> None:
        while not released.wait(_RENEW_SECONDS):
            with suppress(OSError):  # the disk does not answer for a moment
                if _owner(path) not in (None, mine):
                    on_lost()
                    return
                os.utime(path)

    thread = threading.Thread(target=renew, name="run lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        released.set()
        thread.join(_RENEW_SECONDS)
        with suppress(OSError):
            if _owner(path) == mine:
                path.unlink()


def _owner(path: Path) -> dict[str, object] | None:
    """What the file says; None if there is none, or it is damaged."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"host", "pid"} <= found.keys() else None


def _renewed(path: Path) -> int | None:
    """When the file was renewed. Opens it, so that a network file system asks its server."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None
