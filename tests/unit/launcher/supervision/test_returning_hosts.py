import errno
import itertools
import threading
from collections.abc import Collection
from pathlib import Path

import pytest

from experiment.run_files import checkpoints
from experiment.run_files.run_folder import RunFolder, open_run_folder
from launcher.hosts import guarded_hosts
from launcher.supervision import returning_hosts as module
from launcher.supervision.returning_hosts import unusable_hosts, watch_for_hosts
from stand_in_hosts import install_ssh
from waiting import wait_until


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    return open_run_folder(tmp_path / "run")


def save(folder: RunFolder, step: int) -> None:
    checkpoint = folder.checkpoints / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE").touch()


def test_hosts_that_answer_and_see_the_run_folder(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a host that is left out without the reason that ssh gives."""
    install_ssh(tmp_path / "bin", monkeypatch)
    unknown = "ssh: Could not resolve hostname missing-2: Name or service not known"
    assert unusable_hosts(["node-1", "missing-2", "node-3"], folder) == {"missing-2": unknown}
    assert list(unusable_hosts(["node-1"], RunFolder(tmp_path / "other"))) == ["node-1"]


def test_a_disk_that_does_not_answer_is_not_called_missing(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a user who looks for a folder that is there."""
    install_ssh(tmp_path / "bin", monkeypatch, before="exit 124")
    assert "does not answer within 2" in unusable_hosts(["node-1"], folder)["node-1"]


def test_a_host_has_as_long_to_answer_as_its_guard(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a slow host that is left out, although a guard would start there, a host that is blamed for the silence
    of another one, and a ProxyCommand that stays."""
    before = f'[ "$1" = hangs ] && {{ sleep 3600 & echo $! > {tmp_path}/proxy; sleep 3600; }}'
    install_ssh(tmp_path / "bin", monkeypatch, before=before)
    monkeypatch.setattr(guarded_hosts, "_START_SECONDS", 1.0)
    assert unusable_hosts(["hangs", "node-2"], folder) == {"hangs": "no answer within 1 s"}
    proxy = Path("/proc", (tmp_path / "proxy").read_text().strip(), "stat")
    wait_until(lambda: not proxy.exists() or proxy.read_text().split()[2] == "Z")


def test_hosts_are_looked_at_less_and_less_often() -> None:
    """Catches thousands of connections to a host that is away for weeks."""
    assert list(itertools.islice(module.poll_intervals(), 6)) == [10, 20, 40, 80, 120, 120]


def test_a_host_is_taken_back_after_the_next_checkpoint(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that restarts whenever a host comes and goes, and one that never takes it back."""
    returned = threading.Event()
    looks: list[Path] = []
    completed_saves = module.completed_saves
    monkeypatch.setattr(module, "completed_saves", lambda path: looks.append(path) or completed_saves(path))
    save(folder, 1)
    with watch_for_hosts(["node-2"], lambda hosts: hosts, folder, returned.set):
        wait_until(lambda: len(looks) > 2 or returned.is_set())  # the first look is at the saves before
        assert not returned.is_set()
        for step in itertools.count(2):
            save(folder, step)
            if returned.wait(0.1):
                break


def test_a_host_is_taken_back_after_a_disk_error(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a host that is never taken back after one error while listing checkpoints."""
    returned, failed = threading.Event(), threading.Event()
    working = checkpoints.complete_checkpoints

    def fail_once(path: Path) -> list[Path]:
        if failed.is_set():
            return working(path)
        failed.set()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoints, "complete_checkpoints", fail_once)
    with watch_for_hosts(["node-2"], lambda hosts: hosts, folder, returned.set):
        for step in itertools.count(1):
            save(folder, step)
            if returned.wait(0.1):
                break
    assert failed.is_set()


def test_nothing_is_taken_back_after_the_end(folder: RunFolder) -> None:
    """Catches a STOP file that ends the next attempt: the last checkpoint of an attempt is a new one too."""
    asked, go_on, returned = threading.Event(), threading.Event(), threading.Event()
    answers = iter([True, False])  # the second question is asked after the checkpoint

    def find(hosts: Collection[str]) -> Collection[str]:
        if not next(answers):
            asked.set()
            assert go_on.wait(60)
        return hosts

    with watch_for_hosts(["node-2"], find, folder, returned.set):
        for step in itertools.count(1):
            save(folder, step)
            if asked.wait(0.1):
                break
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "returning hosts")
    go_on.set()
    thread.join(60)
    assert not thread.is_alive()
    assert not returned.is_set()
