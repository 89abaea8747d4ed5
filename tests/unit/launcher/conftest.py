import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def default_signals() -> Iterator[None]:
    """The tests may run under nohup, which ignores SIGHUP, or in the background of a script, which ignores SIGINT; so
    would the processes that they start. A command that ends ignores all of them."""
    defaults = (
        (signal.SIGHUP, signal.SIG_DFL),
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_DFL),
        (signal.SIGUSR1, signal.SIG_DFL),
        (signal.SIGUSR2, signal.SIG_DFL),
    )
    previous = {number: signal.signal(number, handler) for number, handler in defaults}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)
