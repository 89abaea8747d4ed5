import json
import os
import threading
import time
from pathlib import Path

import pytest

from experiment import run_lock
from experiment.errors import UserError
from experiment.run_folder import RunFolder, open_run_folder
from experiment.run_lock import check_unlocked, is_locked, lock_run
from waiting import wait_until


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(run_lock, "_RENEW_SECONDS", 0.05)
    return open_run_folder(tmp_path / "run")


def be_elsewhere(folder: RunFolder) -> None:
    """What a process on another machine leaves that does not end properly."""
    folder.owner.write_text(json.dumps({"host": "elsewhere", "pid": 7, "id": "1"}))


def test_a_live_process_on_another_machine_is_respected(folder: RunFolder) -> None:
    """Catches two machines that write to one run on a network disk without locks."""
    be_elsewhere(folder)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(0.02):
            os.utime(folder.owner)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(UserError, match="another deepcloze process, 7 on elsewhere, is using"), lock_run(folder):
            pass
        with pytest.raises(UserError, match="another deepcloze process, 7 on elsewhere, is using"):
            check_unlocked(folder)
    finally:
        ended.set()
        thread.join()
    assert not is_locked(folder)
    assert folder.owner.exists()


def test_a_dead_machine_is_replaced(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_DEAD_SECONDS", 0.5)
    be_elsewhere(folder)
    with lock_run(folder):
        assert json.loads(folder.owner.read_text())["pid"] == os.getpid()
        renewed = folder.owner.stat().st_mtime_ns
        wait_until(lambda: folder.owner.stat().st_mtime_ns != renewed)
    assert not folder.owner.exists()


def test_a_killed_process_of_this_machine_delays_nothing(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    be_elsewhere(folder)
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    started = time.monotonic()
    with lock_run(folder):
        pass
    assert time.monotonic() - started < run_lock._DEAD_SECONDS / 2


def test_a_process_that_was_replaced_is_told(folder: RunFolder) -> None:
    """Catches a machine that continues a run which another machine has taken over."""
    lost = threading.Event()
    with lock_run(folder, lost.set):
        be_elsewhere(folder)
        assert lost.wait(60)
    assert json.loads(folder.owner.read_text())["host"] == "elsewhere"


def test_a_damaged_file_is_ignored(folder: RunFolder) -> None:
    folder.owner.write_text("{")
    check_unlocked(folder)
    with lock_run(folder):
        assert is_locked(folder)
        with pytest.raises(UserError, match="another deepcloze process is using"):
            check_unlocked(folder)
