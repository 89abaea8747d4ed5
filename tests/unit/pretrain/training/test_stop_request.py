import ctypes
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from pretrain.training.stop_request import StopRequest, exit_on_signal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_training_is_handled_while_the_main_thread_is_blocked(number: signal.Signals) -> None:
    """Catches a rank that cannot be stopped while it connects or builds: Python's handlers wait for the main thread."""
    received: list[str] = []
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    release = partial(libc.pthread_mutex_unlock, mutex)

    def end_process(name: str) -> None:
        received.append(name)
        release()

    fallback = threading.Timer(60, release)
    fallback.start()
    libc.pthread_mutex_lock(mutex)
    with exit_on_signal(end_process):
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        libc.pthread_mutex_lock(mutex)  # blocks outside of Python; no signal interrupts it
        fallback.cancel()
    assert received == [number.name]


def test_signals_are_counted_once(tmp_path: Path) -> None:
    """Catches a signal during training, or after it, that ends the process without a checkpoint."""
    received: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    threads = threading.active_count()
    with exit_on_signal(received.append):
        with StopRequest(None) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.reason == "signal SIGTERM"
        os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + 60
    while threading.active_count() > threads:
        assert time.monotonic() < deadline, "the thread has not ended"
        time.sleep(0.01)
    assert received == []
    assert signal.getsignal(signal.SIGTERM) == before


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
