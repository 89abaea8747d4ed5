import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def not_under_nohup() -> Iterator[None]:
    """The tests may run under nohup, which ignores SIGHUP; so would the processes that they start."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)
