import errno
import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import IO, Any

import filelock
import pytest

from experiment.errors import HostError, UserError
from experiment.run_files import run_lock
from experiment.run_files.outcome_file import RankRecord
from experiment.run_files.run_folder import RunFolder, open_run_folder
from experiment.run_files.run_lock import (
    FolderUse,
    LockTimes,
    Owner,
    check_unlocked,
    folder_use,
    is_locked,
    lock_run,
    lock_until_exit,
)
from launcher.supervision.rank_processes import polled
from waiting import wait_until

FAST = LockTimes(renew=0.05)
IMPATIENT = LockTimes(renew=0.05, dead=0.5)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return open_run_folder(tmp_path / "run")


def be_elsewhere(folder: RunFolder, host: str = "elsewhere") -> None:
    """What a process on another machine leaves that does not end properly."""
    folder.owner.write_text(json.dumps({"host": host, "boot": "1", "pid": 7, "id": "1"}))


def renewed(folder: RunFolder) -> AbstractContextManager[None]:
    """The file of the owner is renewed, as by a process that lives."""

    def renew() -> bool:
        os.utime(folder.owner)
        return False

    renew()
    return polled(renew, 0.02, "renew")


def test_a_live_process_on_another_machine_is_respected(folder: RunFolder) -> None:
    """Catches two machines that write to one run on a network disk without locks."""
    be_elsewhere(folder)
    with renewed(folder):
        with (
            pytest.raises(UserError, match="another deepcloze process, 7 on elsewhere, is using"),
            lock_run(folder, times=FAST),
        ):
            pass
        with pytest.raises(UserError, match="another deepcloze process, 7 on elsewhere, is using"):
            check_unlocked(folder, FAST)
    assert not is_locked(folder)
    assert folder.owner.exists()


def test_a_dead_machine_is_replaced(folder: RunFolder) -> None:
    be_elsewhere(folder)
    with lock_run(folder, times=IMPATIENT):
        assert json.loads(folder.owner.read_text())["pid"] == os.getpid()
        renewed = folder.owner.stat().st_mtime_ns
        wait_until(lambda: folder.owner.stat().st_mtime_ns != renewed)
    assert not folder.owner.exists()


def test_the_machine_that_replaces_a_dead_one_is_named(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches `status` saying that the run is active on the dead machine."""
    is_renewed = run_lock._is_renewed

    def replaced(*args: Any) -> bool | None:
        be_elsewhere(folder, "node-2")
        return is_renewed(*args)

    be_elsewhere(folder)
    os.utime(folder.owner, (0, 0))
    monkeypatch.setattr(run_lock, "_is_renewed", replaced)
    assert folder_use(folder, FAST) == FolderUse(True, "node-2")


def test_a_killed_process_of_this_machine_delays_nothing(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    be_elsewhere(folder)
    monkeypatch.setattr(run_lock, "this_machine", lambda: {"host": "elsewhere", "boot": "1"})
    started = time.monotonic()
    with lock_run(folder, times=FAST):
        pass
    assert time.monotonic() - started < FAST.dead / 2


def test_the_lock_that_a_network_disk_keeps_for_a_dead_machine(folder: RunFolder) -> None:
    """Catches a run that nobody can take over while NFS keeps the lock, and a check that fails for it."""
    be_elsewhere(folder)
    kept = filelock.FileLock(folder.lock, thread_local=False)  # released by another thread
    kept.acquire()
    dead = check_unlocked(folder, IMPATIENT)
    release = threading.Timer(0.5, kept.release)
    release.start()
    with lock_run(folder, dead=dead, times=IMPATIENT):
        assert json.loads(folder.owner.read_text())["pid"] == os.getpid()
    release.join()


def test_the_lock_that_a_network_disk_keeps_for_the_ranks_of_a_dead_host(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a launch that is refused after a host was lost, for ranks that have ended with it."""
    RankRecord(1, "elsewhere", 7, training=True).write(folder)
    kept = filelock.FileLock(folder.processes_lock)
    kept.acquire()
    monkeypatch.setattr(run_lock, "notify", lambda _: kept.release())
    check_unlocked(folder, LockTimes(dead=0.0, quiet=0.0))
    assert not kept.is_locked


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the disk have no locks, as NFS without lockd or Lustre without `-o flock`."""

    def refuse(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("without_locks")
def test_a_disk_without_locks(folder: RunFolder) -> None:
    """Catches a traceback, two processes that write to one run, and a live run that counts as killed."""
    with lock_run(folder, times=FAST):
        assert folder_use(folder, FAST) == FolderUse(True, platform.node())
        with pytest.raises(UserError, match=f"another deepcloze process, {os.getpid()} on"):
            check_unlocked(folder, FAST)
        with (
            pytest.raises(UserError, match=f"another deepcloze process, {os.getpid()} on"),
            lock_run(folder, times=FAST),
        ):
            pass
        assert Owner(folder).is_alive()
    assert folder_use(folder, FAST) == FolderUse(False)
    lock_until_exit(folder)
    assert check_unlocked(folder) is None
    with lock_run(folder):
        pass


@pytest.mark.usefixtures("without_locks")
def test_a_killed_process_on_a_disk_without_locks(folder: RunFolder) -> None:
    """Catches a run that can be resumed only after someone has deleted a lock."""
    folder.lock.touch()
    folder.owner.write_text(json.dumps({**run_lock.this_machine(), "pid": 7, "id": "1"}))
    assert folder_use(folder, LockTimes(renew=0.05, observe=0.2)).alive is None
    dead = check_unlocked(folder, IMPATIENT)
    assert dead is not None
    with lock_run(folder, dead=dead, times=LockTimes(dead=3600.0)):
        assert json.loads(folder.owner.read_text())["pid"] == os.getpid()


def test_a_disk_that_does_not_answer_does_not_end_a_process(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that is taken from a live process because its file could not be read for a moment."""
    be_elsewhere(folder)
    path_open, failures = Path.open, [False, False, *[True] * 5]

    def fail(path: Path, *args: Any, **options: Any) -> IO[Any]:
        here = path == folder.owner and threading.current_thread() is threading.main_thread()
        if here and failures and failures.pop(0):
            raise OSError(errno.EIO, "Input/output error")
        return path_open(path, *args, **options)

    monkeypatch.setattr(Path, "open", fail)
    with renewed(folder), pytest.raises(UserError, match="7 on elsewhere"):
        check_unlocked(folder, FAST)
    for before in ([True], [False, True]):
        failures[:] = before
        with renewed(folder), pytest.raises(HostError, match=r"launch\.owner cannot be read: Input/output error"):
            check_unlocked(folder, FAST)


@pytest.mark.usefixtures("without_locks")
def test_two_processes_that_start_at_once_on_a_disk_without_locks(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches two processes that write to one run because both found no owner."""
    both_looked, check_owner, entered = threading.Barrier(2, timeout=60), run_lock._check_owner, []

    def check(*args: Any) -> Any:
        found = check_owner(*args)
        both_looked.wait()
        return found

    def use() -> None:
        with suppress(UserError), lock_run(folder, times=LockTimes(renew=1.0)):  # a busy disk takes a while
            entered.append(1)

    monkeypatch.setattr(run_lock, "_check_owner", check)
    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entered) == 1


@pytest.mark.parametrize("boot", ["2", None])
def test_machines_of_the_same_name_are_told_apart(folder: RunFolder, boot: str | None) -> None:
    """Catches two machines called `localhost` or `ubuntu` that write to one run. None: of an earlier version."""
    owner = {"host": platform.node(), "pid": 7} | ({"boot": boot} if boot else {})
    folder.owner.write_text(json.dumps(owner))
    with (
        renewed(folder),
        pytest.raises(UserError, match="another deepcloze process, 7 on"),
        lock_run(folder, times=FAST),
    ):
        pass


def test_a_dead_machine_is_waited_for_once(folder: RunFolder) -> None:
    """Catches 20 seconds before preflight and again before the ranks start."""
    be_elsewhere(folder)
    dead = check_unlocked(folder, IMPATIENT)
    with lock_run(folder, dead=dead, times=LockTimes(dead=3600.0)):
        pass
    assert check_unlocked(folder, FAST) is None


def test_a_dead_machine_that_returns_is_respected(folder: RunFolder) -> None:
    """Catches a run that is taken from a machine that has renewed its file again."""
    be_elsewhere(folder)
    dead = check_unlocked(folder, IMPATIENT)
    with (
        renewed(folder),
        pytest.raises(UserError, match="7 on elsewhere"),
        lock_run(folder, dead=dead, times=FAST),
    ):
        pass


def test_a_process_that_was_replaced_is_told(folder: RunFolder) -> None:
    """Catches a machine that continues a run which another machine has taken over."""
    lost = threading.Event()
    with lock_run(folder, lost.set, times=FAST):
        be_elsewhere(folder)
        assert lost.wait(60)
    assert json.loads(folder.owner.read_text())["host"] == "elsewhere"


def test_a_folder_that_is_deleted_is_told_once(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that trains on without its metrics and logs, and says nothing, or beside one that is started again
    in the same folder."""
    said: list[str] = []
    monkeypatch.setattr(run_lock, "notify", said.append)
    lost = threading.Event()
    with lock_run(folder, lost.set, times=FAST):
        shutil.rmtree(folder.path)
        wait_until(lambda: bool(said))
        folder.logs.mkdir(parents=True)
        be_elsewhere(folder)
        assert lost.wait(60)
    message = "was deleted while a run writes there: stop the run, and start it again"
    assert said == [f"warning: {folder.logs} {message}"]


def test_a_lock_of_another_user(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a live run of someone else that counts as killed."""
    os_open = os.open

    def open_file(path: Path, flags: int, *mode: int) -> int:
        if path == folder.lock and flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied")
        return os_open(path, flags, *mode)

    with lock_run(folder):
        monkeypatch.setattr(os, "open", open_file)
        assert is_locked(folder)
        monkeypatch.undo()
    monkeypatch.setattr(os, "open", open_file)
    assert not is_locked(folder)


def test_a_damaged_file_is_ignored(folder: RunFolder) -> None:
    folder.owner.write_text("{")
    check_unlocked(folder, FAST)
    with lock_run(folder, times=FAST):
        assert is_locked(folder)
        with pytest.raises(UserError, match="another deepcloze process is using"):
            check_unlocked(folder, FAST)


def test_ranks_that_outlived_their_launch_are_respected(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches two launches that train in one folder, after the first one and its watchdog were killed, and a launch
    that is refused because it follows a killed one too fast."""
    code = """
import sys
from pathlib import Path
from experiment.run_files.run_folder import RunFolder
from pretrain.rank_process import RankRecorder
RankRecorder(RunFolder(Path(sys.argv[1])), 0).start()
sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(folder.path)]
    RankRecord(1, "node-2", 7, training=True, exit=0).write(folder)
    (folder.logs / "rank-2.json").write_text("{")
    with subprocess.Popen(command, stdin=subprocess.PIPE) as rank:
        wait_until(folder.rank_record(0).exists, rank)
        message = f"still use {re.escape(str(folder.path))}; end them: process {rank.pid} on {platform.node()}$"
        with pytest.raises(UserError, match=message):
            check_unlocked(folder, IMPATIENT)
        with pytest.raises(UserError, match=message), lock_run(folder, times=IMPATIENT):
            pass
        assert is_locked(folder)

        threading.Timer(0.3, rank.kill).start()
        with lock_run(folder, times=LockTimes(dead=60.0, quiet=0.0)):
            assert rank.wait() != 0
    assert capsys.readouterr().err.count("waiting for the processes of an earlier command to end") == 1
    assert not is_locked(folder)


def test_ranks_of_a_group_can_lock_the_folder_in_turn(folder: RunFolder) -> None:
    """Catches ranks that hold no lock, or do not start, because another user of a shared folder made its files."""
    code = """
import sys
from pathlib import Path
from experiment.run_files.heartbeat import Heartbeat, write_heartbeat
from experiment.run_files.run_folder import RunFolder
from experiment.run_files.run_lock import lock_until_exit
folder = RunFolder(Path(sys.argv[1]))
lock_until_exit(folder)
write_heartbeat(folder, Heartbeat(0, "node-1", 7, 1, 0, "trains", False, 0.0))
"""
    subprocess.run([sys.executable, "-c", code, str(folder.path)], check=True, umask=0o002)
    for path in (folder.processes_lock, folder.heartbeat(0)):
        assert path.stat().st_mode & 0o777 == 0o664


def test_a_look_at_the_folder_does_not_refuse_its_owner(folder: RunFolder) -> None:
    """Catches a start that is refused because `status` looks at that moment whether the run is active."""
    with folder.lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        threading.Timer(0.1, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        check_unlocked(folder)
        fcntl.flock(file, fcntl.LOCK_EX)
        threading.Timer(0.1, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        with lock_run(folder):
            assert is_locked(folder)
