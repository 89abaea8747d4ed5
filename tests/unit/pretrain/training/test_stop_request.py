import os
import signal
from pathlib import Path

import pytest

from pretrain.training.stop_request import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_requests_a_stop(number: signal.Signals) -> None:
    """Catches a signal that ends the rank at once, and signal handlers that are not restored."""
    before = signal.getsignal(number)
    stop = StopRequest(None)
    try:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.reason == f"signal {number.name}"
    finally:
        stop.close()
    assert signal.getsignal(number) == before


def test_a_stop_file_requests_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a STOP file that is checked for only once, or at every step, which is slow on a network disk."""
    now = 100.0
    monkeypatch.setattr("pretrain.training.stop_request.time.monotonic", lambda: now)
    stop = StopRequest(tmp_path / "STOP")
    try:
        assert stop.reason is None
        (tmp_path / "STOP").touch()
        now += 0.1
        assert stop.reason is None, "checked again after 0.1 s"
        now += 1.0
        assert stop.reason == f"found {tmp_path / 'STOP'}"
        (tmp_path / "STOP").unlink()
        assert stop.reason is not None, "a request cannot be withdrawn"
    finally:
        stop.close()
