import os
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


def test_workers_have_the_environment_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches credentials that a notebook sets after its first corpus and that workers do not get, or get although they
    were removed; and a variable that is left to the caller."""
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    for key in ("old", "new", None):
        if key is None:
            monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        else:
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        with worker_pool(1, "") as pool:
            assert pool.submit(os.getenv, "AWS_ACCESS_KEY_ID").result() == key
    assert "PYTHONSAFEPATH" not in os.environ
