"""Commands that a command starts, with stand-ins for them."""

from collections.abc import Sequence
from pathlib import Path

import filelock
import pytest

from experiment.run_folder import open_run_folder
from launcher import run_set
from launcher.run_set import DONE, REJECTED, ChildRun, start


def test_a_run_that_another_process_was_starting_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that counts as failed because the process that a killed command had just started was faster."""
    run = ChildRun("compare", "[1/1] a/b", open_run_folder(tmp_path / "run"), ("command",))
    lock, codes = filelock.FileLock(run.folder.lock), [2, 0]

    def run_command(argv: Sequence[str]) -> int:
        if len(codes) == 2:
            lock.acquire(timeout=0)
        return codes.pop(0)

    monkeypatch.setattr(run_set, "_run_command", run_command)
    monkeypatch.setattr(run_set.time, "sleep", lambda _: lock.release())
    assert start(run) == DONE
    assert not codes


@pytest.mark.parametrize(("code", "state"), [(0, DONE), (1, "failed (exit code 1)"), (2, REJECTED)])
def test_a_state_tells_how_a_run_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, state: str) -> None:
    """Catches a mistake of the user that looks like a failure, and a run that is started twice."""
    codes = [code]
    monkeypatch.setattr(run_set, "_run_command", lambda argv: codes.pop(0))
    assert start(ChildRun("compare", "a/b", open_run_folder(tmp_path / "run"), ())) == state
