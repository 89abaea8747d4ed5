"""Which kill `StopSignals` calls when; signals themselves are tested in `test_supervisor`."""

from pathlib import Path

import pytest

from experiment.run_files.run_folder import RunFolder
from launcher.supervision.stop_signals import StopSignals


@pytest.fixture
def stop(tmp_path: Path) -> StopSignals:
    return StopSignals(RunFolder(tmp_path))


def test_the_innermost_is_called_while_it_runs(stop: StopSignals) -> None:
    """Catches ranks that are not killed, and a kill of processes that have ended: others may have their ids by now."""
    calls: list[str] = []
    with stop.killing(lambda: calls.append("guards")):
        with stop.killing(lambda: calls.append("ranks")):
            assert calls == []
            stop.kill_ranks()
        stop.kill_ranks()
    stop.kill_ranks()
    assert calls == ["ranks", "guards"]


def test_what_starts_after_a_kill_is_killed_at_once(stop: StopSignals) -> None:
    """Catches ranks that keep running because the signal came before they had started."""
    calls: list[str] = []
    stop.kill_ranks()
    with stop.killing(lambda: calls.append("ranks")):
        assert calls == ["ranks"]


def test_an_error_ends_the_killing(stop: StopSignals) -> None:
    """Catches a kill of processes that have ended, after a disk has failed."""
    calls: list[str] = []
    with pytest.raises(OSError, match="disk"), stop.killing(lambda: calls.append("ranks")):
        raise OSError("disk")
    stop.kill_ranks()
    assert calls == []
