import os
import signal
from collections.abc import Iterator

import pytest

from launcher.signal_handlers import handle_stop_signals


@pytest.fixture
def under_nohup() -> Iterator[None]:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, previous)


def test_stop_signals_are_passed_on_and_restored() -> None:
    """Catches a signal that kills the command instead, and a handler that stays after the ranks have exited."""
    before = signal.getsignal(signal.SIGTERM)
    received: list[int] = []
    with handle_stop_signals(received.append):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(os.getpid(), number)
    assert received == [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    assert signal.getsignal(signal.SIGTERM) is before


def test_nohup_keeps_sighup_ignored(under_nohup: None) -> None:
    """Catches a command under nohup that stops at logout."""
    received: list[int] = []
    with handle_stop_signals(received.append):
        os.kill(os.getpid(), signal.SIGHUP)
    assert received == []
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
