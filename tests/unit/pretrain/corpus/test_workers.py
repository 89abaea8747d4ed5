import signal

import pytest

from pretrain.corpus.workers import worker_pool

pickled: list[bool] = []


class Interrupting:
    """Is interrupted while a worker starts, to which it is sent."""

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        signal.raise_signal(signal.SIGINT)
        pickled.append(True)
        return str, ("received",)


def test_ctrl_c_waits_until_a_worker_has_started() -> None:
    """Catches a worker that the pool forgets, and that prints a traceback because its semaphores are removed."""
    pickled.clear()
    with pytest.raises(KeyboardInterrupt), worker_pool(1, "", len, Interrupting()) as pool:
        pool.submit(abs, -1)
    assert pickled == [True]
