"""Commands that a command starts, with stand-ins for them."""

import os
import sys
from pathlib import Path

import filelock
import pytest

from experiment.errors import StoppedError
from experiment.files import write_json
from experiment.run_files.run_folder import open_run_folder
from launcher.run_sets import child_run
from launcher.run_sets.child_run import DONE, REJECTED, ChildRun, start, wait_for_other_process
from launcher.supervision.rank_processes import polled


def shell(script: str) -> tuple[str, ...]:
    return "sh", "-c", script


def test_a_run_that_another_process_was_starting_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that counts as failed because the process that a killed command had just started was faster."""
    refused_once = shell(f"test -e {tmp_path}/tried && exit 0; touch {tmp_path}/tried; exit 2")
    run = ChildRun("compare", "[1/1] a/b", open_run_folder(tmp_path / "run"), refused_once)
    lock = filelock.FileLock(run.folder.lock)
    lock.acquire(timeout=0)
    monkeypatch.setattr(child_run.time, "sleep", lambda _: lock.release())
    assert start(run) == DONE


def test_a_run_on_another_machine_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that counts as failed because a killed command on another machine has left it running."""
    run = ChildRun("compare", "a/b", open_run_folder(tmp_path / "run"), shell("exit 1"))
    write_json(run.folder.owner, {"host": "elsewhere", "boot": "1", "pid": 7, "id": "1"})
    said: list[str] = []

    def renew() -> bool:
        if said:
            run.folder.owner.unlink()
        else:
            os.utime(run.folder.owner)
        return bool(said)

    monkeypatch.setattr(child_run, "notify", said.append)
    with polled(renew, 0.02, "renew"):
        wait_for_other_process(run)
    assert said == [f"compare: a/b: waiting for the process that is using {run.folder.path}"]


@pytest.mark.parametrize(("code", "state"), [(0, DONE), (1, "failed (exit code 1)"), (2, REJECTED)])
def test_a_state_tells_how_a_run_ended(tmp_path: Path, code: int, state: str) -> None:
    """Catches a mistake of the user that looks like a failure, and a run that is started twice."""
    command = shell(f"echo started >> {tmp_path}/log; exit {code}")
    assert start(ChildRun("compare", "a/b", open_run_folder(tmp_path / "run"), command)) == state
    assert (tmp_path / "log").read_text() == "started\n"


def test_a_signal_to_a_run_that_exits_with_0(tmp_path: Path) -> None:
    """Catches a stop signal that is ignored because the run exits with code 0."""
    finishing = """if True:
        import os, signal, time
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(600)
    """
    run = ChildRun("sweep", "[1/2] a/b", open_run_folder(tmp_path / "run"), (sys.executable, "-c", finishing))
    with pytest.raises(StoppedError, match=r"stopped at \[1/2\] a/b"):
        start(run)
