"""One process at a time writes to a run folder: the launch of a pretraining run, or a fine-tuning run.

On one machine the system keeps the lock and releases it when the process ends, however it ends. Not all network file
systems do that between machines, and some have no locks. There the owner renews a file, and one that has not been
renewed for a while counts as dead.

The ranks of a launch hold a second lock: if both the launch and its watchdog are killed, they may train on. So do the
processes of `training.parallel_seeds`, which take a while to save their state when the command is killed.
"""

import fcntl
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from experiment.errors import UserError, notify, require_damage
from experiment.file_locks import is_path_locked, opened_lock
from experiment.files import read_json, write_json
from experiment.run_files.outcome_file import read_rank_records
from experiment.run_files.run_folder import RunFolder

CLOCK_SKEW = 60.0
"""Seconds that may lie between the clocks of this machine and of the disk."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # see random(4)
_LEASE_SECONDS = 120.0  # for which an NFS server keeps the lock of a dead client; Linux: 90
_LOOK_SECONDS = 1.0  # a process that looks whether the folder is in use holds the lock for a moment
_POLL_SECONDS = 0.1

Renewal = int
"""The time a file was renewed: st_mtime_ns."""


@dataclass(frozen=True)
class LockTimes:
    """Times of the lock, in seconds."""

    renew: float = 2.0  # between two renewals of the file
    dead: float = 20.0  # a machine that has not renewed its file for so long is dead, or has lost the disk
    observe: float = 5.0  # for which `folder_use` waits for another machine to renew its file
    quiet: float = 1.0  # of waiting for processes, until a message says so


_TIMES = LockTimes()


@contextmanager
def lock_run(
    folder: RunFolder,
    on_lost: Callable[[], object] = lambda: None,
    dead: Renewal | None = None,
    times: LockTimes = _TIMES,
    await_processes: bool = True,
) -> Iterator[None]:
    """Lock a run folder, which must exist. Raises UserError if another process, here or on another machine, uses it.
    Ranks that a dead launch has left get some time to end, unless `await_processes` is False.

    Takes as long as `times.dead` after a process on another machine, or before a reboot of this one, that did not
    end properly, unless `dead` was returned by `check_unlocked`. `on_lost` is called in a thread if another
    machine takes the lock because this one has lost the disk for so long.
    """
    with opened_lock(folder.lock) as lock:
        if (locked := lock(_LOOK_SECONDS)) is False:
            if _other_owner(folder) is None:
                raise _used(folder)
            dead = _check_owner(folder, times, dead)  # it is dead, but NFS keeps its lock for some time
            if (locked := lock(_LEASE_SECONDS)) is False:
                raise _used(folder)
        _check_owner(folder, times, dead)
        if await_processes:
            _wait_for_processes(folder, times)
        with _owner_file(folder.owner, on_lost, times.renew) as mine:
            if locked is None:  # two processes may have found no owner, and the file is of the last one
                time.sleep(times.renew / 2)
                if _owner(folder.owner) != mine:
                    raise _used(folder)
            yield


def check_unlocked(folder: RunFolder, times: LockTimes = _TIMES) -> Renewal | None:
    """Raise UserError like `lock_run`. The folder may not exist, and nothing is written.

    Returns the last renewal of a process on another machine that was found dead, for `lock_run`: it need not wait.
    """
    dead = _check_owner(folder, times)
    if _other_owner(folder) is None and _stays_held(folder.lock):
        raise _used(folder)
    _wait_for_processes(folder, times)
    return dead


def lock_until_exit(folder: RunFolder) -> None:
    """Lock the run folder until this process ends, together with the other ranks. Raises OSError."""
    descriptor = os.open(folder.processes_lock, os.O_RDWR | os.O_CREAT, 0o666)  # stays open
    with suppress(OSError):  # a disk without locks
        fcntl.flock(descriptor, fcntl.LOCK_SH)


def is_locked(folder: RunFolder) -> bool:
    """Return whether another process of this machine, or a rank, uses the run folder, which may not exist. False if the
    disk cannot tell, see `folder_use`."""
    return any(map(is_path_locked, (folder.lock, folder.processes_lock)))


def _stays_held(lock: Path) -> bool:
    """Return whether a lock is held for longer than the moment that `is_path_locked` in another process takes."""
    end = time.monotonic() + _LOOK_SECONDS
    while is_path_locked(lock):
        if time.monotonic() > end:
            return True
        time.sleep(_POLL_SECONDS)
    return False


def _wait_for_processes(folder: RunFolder, times: LockTimes) -> None:
    """Wait for processes of an earlier, killed command. Raises UserError if they do not end within `times.dead`, or
    `_LEASE_SECONDS` if some were on other machines, which may be dead."""
    start, limit, said = time.monotonic(), times.dead, False
    while is_path_locked(folder.processes_lock):
        seconds = time.monotonic() - start
        if seconds > times.quiet and not said:
            notify(f"waiting for the processes of an earlier command to end, in {folder.path}")
            said = True
            if any(rank.exit is None and rank.host != platform.node() for rank in read_rank_records(folder)):
                limit = _LEASE_SECONDS
        if seconds > limit:
            running = [f"process {rank.pid} on {rank.host}" for rank in read_rank_records(folder) if rank.exit is None]
            raise UserError(
                f"run.dir: processes of an earlier command, which was killed, still use {folder.path}; end them: "
                f"{', '.join(running) or f'fuser {folder.processes_lock} names them'}"
            )
        time.sleep(_POLL_SECONDS)


@dataclass(frozen=True)
class FolderUse:
    """Whether a process uses a run folder."""

    alive: bool | None  # None: not known, another machine does not renew its file
    host: str | None = None  # of the process that does, or did and has not ended properly
    silent_seconds: float = 0.0  # since the file was renewed, if it is not known


def folder_use(folder: RunFolder, times: LockTimes = _TIMES) -> FolderUse:
    """Return whether a process of any machine uses the run folder. Writes nothing.

    Takes seconds if the last one has not ended properly, and was on another machine or the disk has no locks.
    """
    owner = _owner(folder.owner)
    host = None if owner is None else str(owner["host"])
    if owner is None or not _is_unlocked(folder, owner):
        return FolderUse(is_locked(folder), host)
    renewed = _renewed(folder.owner)
    alive = _is_renewed(folder, renewed, times.observe, times)
    host = str((_owner(folder.owner) or owner)["host"])  # another process may have taken the folder over meanwhile
    return FolderUse(alive, host, 0.0 if alive is not None else max(0.0, time.time() - (renewed or 0) / 1e9))


class Owner:
    """The process that uses a run folder, as `folder_use`, but at once: one of another machine that has not ended
    properly counts as alive, with a warning while it is silent. One of this machine is alive until it ends: it prints
    how the run ended after it has released the folder."""

    def __init__(self, folder: RunFolder, times: LockTimes = _TIMES) -> None:
        self._folder = folder
        self._times = times
        self._process: psutil.Process | None = None
        self._renewal: Renewal | None = None
        self._renewed_at = 0.0  # as time.monotonic(); infinite after the warning

    def is_alive(self) -> bool:
        owner = _owner(self._folder.owner)
        if owner is not None and _other_owner(self._folder) is not None:
            self._warn_if_silent(owner["host"])
            return True
        with suppress(psutil.NoSuchProcess):
            if owner is not None:
                if owner.get("pid_namespace", mine := _pid_namespace()) != mine:
                    return bool(folder_use(self._folder, self._times).alive)
                process = psutil.Process(owner["pid"])
                # After a kill, another program may have got the process id.
                if process.create_time() < (_renewed(self._folder.owner) or 0) / 1e9 + CLOCK_SKEW:
                    self._process = process
            return self._process is not None and self._process.status() != psutil.STATUS_ZOMBIE
        return False

    def _warn_if_silent(self, host: object) -> None:
        renewal, now = _renewed(self._folder.owner), time.monotonic()
        if renewal != self._renewal:
            self._renewal, self._renewed_at = renewal, now
        elif now - self._renewed_at >= self._times.dead:
            self._renewed_at = math.inf
            silent = f"{host} has not renewed logs/{self._folder.owner.name} for {self._times.dead:.0f} s"
            notify(f"warning: {silent}: the run, the host, or its disk may be down")


def _used(folder: RunFolder) -> UserError:
    return UserError(f"run.dir: another deepcloze process is using {folder.path}")


def _check_owner(folder: RunFolder, times: LockTimes, dead: Renewal | None = None) -> Renewal | None:
    """Raise UserError if a process renews its file, and nothing else tells that it lives. Returns when a dead one last
    did.

    `dead`: the last renewal of a process that has been found dead before.
    """
    try:
        owner, renewed = _read_owner(folder.owner), _read_renewal(folder.owner)
    except OSError as error:
        require_damage(error, f"{folder.owner} cannot be read")
        return None
    if owner is None or not _is_unlocked(folder, owner):
        return None
    alive = None if renewed == dead else _is_renewed(folder, renewed, times.dead, times)
    if alive:
        raise UserError(
            f"run.dir: another deepcloze process, {owner['pid']} on {owner['host']}, is using {folder.path}"
        )
    return None if alive is False else renewed


def _is_renewed(folder: RunFolder, renewed: Renewal | None, seconds: float, times: LockTimes) -> bool | None:
    """Watch the owner's file. Returns None if it stays as it was when it was `renewed`, False if it is removed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(times.renew / 4)
        if (last := _renewed(folder.owner, renewed)) != renewed:
            return last is not None
    return None


def _is_unlocked(folder: RunFolder, owner: dict[str, object]) -> bool:
    """Return whether no lock tells if the owner lives: it is on another machine, or the disk has no locks."""
    return not _is_of_this_machine(owner) or is_path_locked(folder.lock) is None


def _other_owner(folder: RunFolder) -> dict[str, object] | None:
    """Return the content of the owner's file, if the owner is on another machine."""
    owner = _owner(folder.owner)
    return None if owner is None or _is_of_this_machine(owner) else owner


def _is_of_this_machine(owner: dict[str, object]) -> bool:
    return owner.items() >= this_machine().items()


def this_machine() -> dict[str, object]:
    """Names this machine until it reboots: several may have the same name, and containers share the id of a boot."""
    boot = ""
    with suppress(OSError):  # not on Linux
        boot = _BOOT_ID.read_text(encoding="ascii").strip()
    return {"host": platform.node(), "boot": boot}


def _pid_namespace() -> str:
    """Names the process table that ids of this process belong to: a container with the host's name has its own."""
    with suppress(OSError):  # not on Linux
        return str(Path("/proc/self/ns/pid").readlink())
    return ""


@contextmanager
def _owner_file(path: Path, on_lost: Callable[[], object], renew_seconds: float) -> Iterator[dict[str, object]]:
    """Write the file, renew it in a thread, and remove it at the end. Yields its content."""
    mine = {**this_machine(), "pid_namespace": _pid_namespace(), "pid": os.getpid(), "id": os.urandom(8).hex()}
    write_json(path, mine)
    released = threading.Event()

    def renew() -> None:
        warned = False
        while not released.wait(renew_seconds):
            try:
                if _owner(path) not in (None, mine):
                    on_lost()
                    return
                os.utime(path)
            except FileNotFoundError:
                if not warned:
                    notify(
                        f"warning: {path.parent} was deleted while a run writes there: stop the run, and start it again"
                    )
                warned = True
            except OSError:  # the disk does not answer for a moment
                pass

    thread = threading.Thread(target=renew, name="run lock", daemon=True)
    thread.start()
    try:
        yield mine
    finally:
        released.set()
        thread.join(renew_seconds)
        with suppress(OSError):
            if _owner(path) == mine:
                path.unlink()


def _owner(path: Path) -> dict[str, object] | None:
    """Read the file of the owner; None if there is none, or it cannot be read."""
    with suppress(OSError):
        return _read_owner(path)
    return None


def _read_owner(path: Path) -> dict[str, object] | None:
    """Read the file of the owner; None if it is damaged. Raises OSError."""
    try:
        found = read_json(path)
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"host", "pid"} <= found.keys() else None


def _renewed(path: Path, known: Renewal | None = None) -> Renewal | None:
    """Return when the file was renewed; None if there is none, `known` if the disk does not answer."""
    try:
        return _read_renewal(path)
    except FileNotFoundError:
        return None
    except OSError:
        return known


def _read_renewal(path: Path) -> Renewal:
    """Raises OSError. Opens the file, so that a network file system asks its server."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns
