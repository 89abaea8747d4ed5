import os
import signal
from pathlib import Path

import pytest

from pretrain.training.stop_request import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_wish(number: signal.Signals) -> None:
    """Catches a signal that ends the rank at once, and handlers left behind."""
    before = signal.getsignal(number)
    stop = StopRequest(None)
    try:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.reason == f"signal {number.name}"
    finally:
        stop.close()
    assert signal.getsignal(number) == before


def test_a_stop_file_is_a_wish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a STOP file that is looked for once only, or at every step, on a slow disk."""
    now = 100.0
    monkeypatch.setattr("pretrain.training.stop_request.time.monotonic", lambda: now)
    stop = StopRequest(tmp_path / "STOP")
    try:
        assert stop.reason is None
        (tmp_path / "STOP").touch()
        now += 0.1
        assert stop.reason is None, "looked again after a tenth of a second"
        now += 1.0
        assert stop.reason == f"found {tmp_path / 'STOP'}"
        (tmp_path / "STOP").unlink()
        assert stop.reason is not None, "a wish is not taken back"
    finally:
        stop.close()
